//! YAML as JSON values, with the place of every value.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::Spanned;

/// Deepest nesting; the deepest manifest that makes sense has about 20 levels.
const MAX_DEPTH: usize = 64;

/// A YAML document.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) value: Value,
    /// Line and column by path, as in `spec.ports[0].count`.
    places: HashMap<String, (u64, u64)>,
}

impl Document {
    /// Parses `text`, one YAML document.
    ///
    /// # Errors
    /// Line, column and message.
    pub(super) fn parse(text: &str) -> Result<Self, (u64, u64, String)> {
        let node: Spanned<Node> = serde_saphyr::from_str(text).map_err(|error| {
            let place = error
                .location()
                .map_or((0, 0), |at| (at.line(), at.column()));
            let message = error.without_snippet().to_string();
            (place.0, place.1, plain(&message))
        })?;
        let mut document = Self {
            value: Value::Null,
            places: HashMap::new(),
        };
        document.value = document.add(String::new(), node, 0).map_err(|at| {
            (
                at.0,
                at.1,
                format!("is nested more than {MAX_DEPTH} levels deep"),
            )
        })?;
        Ok(document)
    }

    /// Line and column of `path`, or of the nearest value around it.
    pub(super) fn place(&self, path: &str) -> (u64, u64) {
        let mut path = path;
        loop {
            if let Some(place) = self.places.get(path) {
                return *place;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return self.places.get("").copied().unwrap_or((1, 1)),
            }
        }
    }

    fn add(
        &mut self,
        path: String,
        node: Spanned<Node>,
        depth: usize,
    ) -> Result<Value, (u64, u64)> {
        let place = (node.referenced.line(), node.referenced.column());
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
                    let key_place = (key.referenced.line(), key.referenced.column());
                    let value = self.add(within.clone(), item, depth + 1)?;
                    // Where the key is, not the value: that is what one looks for.
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

/// The parser's message without what it says to programmers, and without the
/// place, which is told before it.
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
