//! Parses YAML into JSON values and keeps the place of every value.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::Spanned;

use super::LocatedProblem;

/// Deepest allowed nesting; the deepest useful manifest has about 20 levels.
const MAX_DEPTH: usize = 64;

/// A YAML document.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) value: Value,
    /// Places by path, as in `spec.ports[0].count`.
    places: HashMap<String, Place>,
}

/// A place in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Line, from 1; 0 when unknown.
    pub(super) line: u64,
    /// Column, from 1; 0 when unknown.
    pub(super) column: u64,
}

impl Document {
    /// Parses `text`, one YAML document.
    ///
    /// # Errors
    /// The first problem of the syntax, or of the nesting.
    pub(super) fn parse(text: &str) -> Result<Self, LocatedProblem> {
        let located = |Place { line, column }, message| LocatedProblem {
            line,
            column,
            message,
        };
        let node: Spanned<Node> = serde_saphyr::from_str(text).map_err(|error| {
            let (line, column) = error
                .location()
                .map_or((0, 0), |at| (at.line(), at.column()));
            let message = error.without_snippet().to_string();
            located(Place { line, column }, plain(&message))
        })?;
        let mut document = Self {
            value: Value::Null,
            places: HashMap::new(),
        };
        document.value = document.add(String::new(), node, 0).map_err(|place| {
            located(
                place,
                format!("is nested more than {MAX_DEPTH} levels deep"),
            )
        })?;
        Ok(document)
    }

    /// The place of `path`, or of the nearest value around it.
    pub(super) fn place(&self, path: &str) -> Place {
        let mut path = path;
        loop {
            if let Some(place) = self.places.get(path) {
                return *place;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => {
                    return self
                        .places
                        .get("")
                        .copied()
                        .unwrap_or(Place { line: 1, column: 1 });
                }
            }
        }
    }

    fn add(&mut self, path: String, node: Spanned<Node>, depth: usize) -> Result<Value, Place> {
        let place = Place {
            line: node.referenced.line(),
            column: node.referenced.column(),
        };
        if depth > MAX_DEPTH {
            return Err(place);
        }
        let value = match node.value {
            Node::Scalar(value) => value,
            Node::List(items) => {
                let items = items.into_iter().enumerate();
                let items = items
                    .map(|(index, item)| self.add(format!("{path}[{index}]"), item, depth + 1));
                Value::Array(items.collect::<Result<_, _>>()?)
            }
            Node::Map(entries) => {
                let mut map = Map::new();
                for (key, item) in entries {
                    let within = if path.is_empty() {
                        key.value.clone()
                    } else {
                        format!("{path}.{}", key.value)
                    };
                    let key_place = Place {
                        line: key.referenced.line(),
                        column: key.referenced.column(),
                    };
                    let value = self.add(within.clone(), item, depth + 1)?;
                    // The place of the key, not of the value: users search for it.
                    self.places.insert(within, key_place);
                    map.insert(key.value, value);
                }
                Value::Object(map)
            }
        };
        self.places.entry(path).or_insert(place);
        Ok(value)
    }
}

/// The parser's message without hints for programmers, and without the place,
/// which stands before the message.
fn plain(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    let line = line.split(" at line ").next().unwrap_or_default();
    let line = line
        .split(", set DuplicateKeyPolicy")
        .next()
        .unwrap_or_default();
    match line.split_once("; use from_str_multiple") {
        Some((line, _)) => format!("{line}: give one"),
        None => line.to_owned(),
    }
}

enum Node {
    Scalar(Value),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a YAML value")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_none<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut entries: Vec<(Spanned<String>, Spanned<Node>)> = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }
}
