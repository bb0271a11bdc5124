//! Reads YAML into JSON values as Kubernetes does (`scalar`), and keeps the
//! place of every value.
//!
//! The events of a YAML parser are taken, not its values, because only they
//! have the notation and the tags of scalars.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use granit_parser::{Event, Parser, ScalarStyle, Span, StrInput, options};
use serde_json::{Map, Value};

use super::LocatedProblem;
use super::scalar::Scalar;

/// Deepest allowed nesting; the deepest useful manifest has about 20 levels.
const MAX_DEPTH: usize = 64;

/// Most values of a document. Every use of an alias counts, so that a short file
/// cannot fill the memory; a pool has some hundred.
const MAX_VALUES: usize = 100_000;

/// The key whose value is merged into the fields around it.
const MERGE: &str = "<<";

/// A YAML document.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) value: Value,
    /// Places by path, as in `spec.ports[0].count`.
    places: HashMap<String, TextPosition>,
}

/// A place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TextPosition {
    /// Line, from 1; 0 when unknown.
    pub(super) line: u64,
    /// Column, from 1; 0 when unknown.
    pub(super) column: u64,
}

impl TextPosition {
    const START: Self = Self { line: 1, column: 1 };

    fn of(marker: granit_parser::Marker) -> Self {
        Self {
            line: marker.line() as u64,
            column: marker.col() as u64 + 1,
        }
    }

    fn problem(self, message: impl Into<String>) -> LocatedProblem {
        LocatedProblem {
            line: self.line,
            column: self.column,
            message: message.into(),
        }
    }
}

impl Document {
    /// Reads `text`, which has one YAML document. Empty documents, as a trailing
    /// `---` makes one, do not count; without another, the value is null.
    ///
    /// # Errors
    /// The first problem of the syntax, or of the nesting.
    pub(super) fn parse(text: &str) -> Result<Self, LocatedProblem> {
        let mut document = Self {
            value: Value::Null,
            places: HashMap::new(),
        };
        if let Some(node) = Reader::new(text).read()? {
            let mut values = 0;
            document.value = document.add(String::new(), &node, 0, &mut values)?;
        }
        Ok(document)
    }

    /// The place of `path`, or of the nearest value around it.
    pub(super) fn place(&self, path: &str) -> TextPosition {
        let mut path = path;
        loop {
            if let Some(place) = self.places.get(path) {
                return *place;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return self.places.get("").copied().unwrap_or(TextPosition::START),
            }
        }
    }

    /// Adds `node` at `path`, with aliases and merges carried out. `values` is the
    /// number of values so far.
    fn add(
        &mut self,
        path: String,
        node: &Node,
        depth: usize,
        values: &mut usize,
    ) -> Result<Value, LocatedProblem> {
        let place = node.place;
        check_depth(depth, place)?;
        count(values, place)?;
        let value = match &*node.content {
            Content::Scalar(scalar) => {
                let value = scalar.to_json();
                value.ok_or_else(|| place.problem("must be a number that JSON has"))?
            }
            Content::List(items) => {
                let items = items.iter().enumerate();
                let items = items.map(|(index, item)| {
                    self.add(format!("{path}[{index}]"), item, depth + 1, values)
                });
                Value::Array(items.collect::<Result<_, _>>()?)
            }
            Content::Map(entries) => {
                let mut map = Map::new();
                for (name, key_place, item) in merged(entries, depth, values)? {
                    let within = if path.is_empty() {
                        name.clone()
                    } else {
                        format!("{path}.{name}")
                    };
                    let value = self.add(within.clone(), item, depth + 1, values)?;
                    // The place of the key, not of the value: users search for it.
                    self.places.insert(within, key_place);
                    map.insert(name, value);
                }
                Value::Object(map)
            }
        };
        self.places.entry(path).or_insert(place);
        Ok(value)
    }
}

/// A value of a document. Aliases share the content of what they refer to.
#[derive(Clone)]
struct Node {
    place: TextPosition,
    content: Rc<Content>,
}

enum Content {
    Scalar(Scalar),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// The key of a field.
struct Key {
    place: TextPosition,
    name: String,
    is_merge: bool,
}

/// The fields of a map, each once, with the place of the key. As in Kubernetes,
/// what a merge brings replaces fields before it, and is replaced by those after it.
fn merged<'a>(
    entries: &'a [(Key, Node)],
    depth: usize,
    values: &mut usize,
) -> Result<Vec<(String, TextPosition, &'a Node)>, LocatedProblem> {
    let mut fields: Vec<(String, TextPosition, &'a Node)> = Vec::new();
    let mut indices: HashMap<String, usize> = HashMap::new();
    let mut put = |field: (String, TextPosition, &'a Node)| match indices.get(&field.0) {
        Some(&index) => fields[index] = field,
        None => {
            indices.insert(field.0.clone(), fields.len());
            fields.push(field);
        }
    };
    for (key, node) in entries {
        if !key.is_merge {
            put((key.name.clone(), key.place, node));
            continue;
        }
        let sources = match &*node.content {
            Content::List(items) => items.as_slice(),
            _ => std::slice::from_ref(node),
        };
        // The first of several has precedence.
        for source in sources.iter().rev() {
            check_depth(depth, source.place)?;
            count(values, source.place)?;
            let Content::Map(entries) = &*source.content else {
                return Err(source.place.problem("only fields can be merged by <<"));
            };
            merged(entries, depth + 1, values)?
                .into_iter()
                .for_each(&mut put);
        }
    }
    Ok(fields)
}

fn count(values: &mut usize, place: TextPosition) -> Result<(), LocatedProblem> {
    *values += 1;
    if *values > MAX_VALUES {
        return Err(place.problem(format!(
            "has more than {MAX_VALUES} values, aliases included"
        )));
    }
    Ok(())
}

fn check_depth(depth: usize, place: TextPosition) -> Result<(), LocatedProblem> {
    if depth > MAX_DEPTH {
        return Err(place.problem(format!("is nested more than {MAX_DEPTH} levels deep")));
    }
    Ok(())
}

/// Reads the events of a file into nodes.
struct Reader<'a> {
    events: Parser<'a, StrInput<'a>>,
    anchors: HashMap<usize, Rc<Content>>,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Self {
        let options = options! { emit_comments: false };
        Self {
            events: Parser::new_from_str_with_options(text, options),
            anchors: HashMap::new(),
        }
    }

    /// The one document that is not empty.
    fn read(mut self) -> Result<Option<Node>, LocatedProblem> {
        let mut found: Option<Node> = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => return Ok(found),
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => continue,
                _ => {}
            }
            // Anchors are those of one document.
            self.anchors.clear();
            let node = self.node(event, span, 0)?;
            match &*node.content {
                Content::Scalar(Scalar::Null) => {}
                _ if found.is_some() => {
                    let message = "a second document begins here: give one document in a file";
                    return Err(node.place.problem(message));
                }
                _ => found = Some(node),
            }
        }
    }

    fn next(&mut self) -> Result<(Event<'a>, Span), LocatedProblem> {
        match self.events.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => Err(TextPosition::of(*error.marker()).problem(error.info())),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    /// The value that begins with `event`.
    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Result<Node, LocatedProblem> {
        let place = TextPosition::of(span.start);
        check_depth(depth, place)?;
        let (anchor, content) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let is_plain = style == ScalarStyle::Plain;
                let scalar = Scalar::read(&text, is_plain, tag.as_deref());
                let scalar = scalar.map_err(|message| place.problem(message))?;
                (anchor, Content::Scalar(scalar))
            }
            Event::SequenceStart(_, anchor, _) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break,
                        (event, span) => items.push(self.node(event, span, depth + 1)?),
                    }
                }
                (anchor, Content::List(items))
            }
            Event::MappingStart(_, anchor, _) => (anchor, Content::Map(self.fields(depth)?)),
            Event::Alias(anchor) => {
                let content = self.anchors.get(&anchor).cloned();
                let content =
                    content.ok_or_else(|| place.problem("the alias is within its anchor"))?;
                return Ok(Node { place, content });
            }
            _ => return Err(place.problem("is not a value")),
        };
        let content = Rc::new(content);
        if anchor > 0 {
            self.anchors.insert(anchor, content.clone());
        }
        Ok(Node { place, content })
    }

    /// The fields up to the end of the map.
    fn fields(&mut self, depth: usize) -> Result<Vec<(Key, Node)>, LocatedProblem> {
        let mut fields = Vec::new();
        let mut names = HashSet::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::MappingEnd {
                return Ok(fields);
            }
            let is_merge =
                matches!(&event, Event::Scalar(text, ScalarStyle::Plain, _, None) if text == MERGE);
            let key = self.node(event, span, depth + 1)?;
            let name = match &*key.content {
                Content::Scalar(scalar) => scalar.to_key(),
                _ => None,
            };
            let name = name.ok_or_else(|| key.place.problem("a key must be text"))?;
            if !names.insert(name.clone()) {
                return Err(key.place.problem(format!("duplicate mapping key: {name}")));
            }
            let (event, span) = self.next()?;
            let value = self.node(event, span, depth + 1)?;
            let key = Key {
                place: key.place,
                name,
                is_merge,
            };
            fields.push((key, value));
        }
    }
}
