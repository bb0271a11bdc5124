//! Checks a value against an OpenAPI schema, as the API server would, with messages
//! that say what is allowed.
//!
//! This is not the `jsonschema` crate because the messages are the point: they name
//! the field as in Kubernetes, suggest the field that was meant, and list what is
//! allowed. The rules that Kubernetes adds (`x-kubernetes-…`, empty optional fields)
//! are a third of the work anyway.

use serde_json::{Map, Value};

use crate::plan::FieldProblem;

/// A quantity as text. Source: k8s.io/apimachinery, `resource/quantity.go`.
const QUANTITY: &str = "^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$";

/// What in `value`, which stands at `path`, does not match `schema`.
pub(super) fn check(value: &Value, schema: &Value, path: &str) -> Vec<FieldProblem> {
    let mut checker = Checker {
        root: schema,
        problems: Vec::new(),
    };
    checker.check(value, schema, path);
    checker.problems
}

struct Checker<'a> {
    /// The schema that references point into.
    root: &'a Value,
    problems: Vec<FieldProblem>,
}

impl Checker<'_> {
    fn report(&mut self, path: &str, message: String) {
        self.problems.push(FieldProblem::new(path, message));
    }

    /// Follows a reference into the root schema.
    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let reference = schema.get("$ref").and_then(Value::as_str);
        let target =
            reference.and_then(|reference| self.root.pointer(reference.strip_prefix('#')?));
        target.unwrap_or(schema)
    }

    fn check(&mut self, value: &Value, schema: &Value, path: &str) {
        // Optional fields may be left empty, as Kubernetes allows.
        if value.is_null() {
            return;
        }
        let reference = schema.get("$ref").and_then(Value::as_str);
        if reference.is_some_and(|reference| reference.ends_with(".Quantity")) {
            return self.check_quantity(value, path);
        }
        let schema = self.resolve(schema).clone();
        if let Some([only]) = schema
            .get("allOf")
            .and_then(Value::as_array)
            .map(Vec::as_slice)
        {
            return self.check(value, only, path);
        }
        if let Some(choices) = schema.get("anyOf").and_then(Value::as_array) {
            let real: Vec<&Value> = choices
                .iter()
                .filter(|choice| choice.get("type") != Some(&"null".into()))
                .collect();
            // A choice between several shapes is left to the typed parser.
            if let [only] = real.as_slice() {
                self.check(value, only, path);
            }
            return;
        }
        if !self.check_type(value, &schema, path) {
            return;
        }
        match value {
            Value::Object(fields) => self.check_object(fields, &schema, path),
            Value::Array(items) => self.check_list(items, &schema, path),
            Value::String(text) => self.check_text(text, &schema, path),
            Value::Number(number) => {
                self.check_number(number.as_f64().unwrap_or(f64::NAN), &schema, path)
            }
            Value::Null | Value::Bool(_) => {}
        }
    }

    fn check_type(&mut self, value: &Value, schema: &Value, path: &str) -> bool {
        if schema.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
            return true;
        }
        let allowed: Vec<&str> = match schema.get("type") {
            Some(Value::String(only)) => vec![only],
            Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).collect(),
            _ => return true,
        };
        let found = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let fits = allowed
            .iter()
            .any(|allowed| *allowed == found || (*allowed == "number" && found == "integer"));
        if !fits {
            let (expected, found) = (name(allowed[0]), name(found));
            self.report(path, format!("must be {expected}, not {found}"));
        }
        fits
    }

    fn check_object(&mut self, fields: &Map<String, Value>, schema: &Value, path: &str) {
        let known = schema.get("properties").and_then(Value::as_object);
        let keeps_unknown =
            schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
        let others = schema
            .get("additionalProperties")
            .filter(|others| others.is_object());
        for (field, value) in fields {
            let within = if path.is_empty() {
                field.clone()
            } else {
                format!("{path}.{field}")
            };
            match (known.and_then(|known| known.get(field)), others) {
                (Some(schema), _) | (None, Some(schema)) => self.check(value, schema, &within),
                (None, None) if keeps_unknown || known.is_none() => {}
                (None, None) => self.report_unknown(field, known, &within),
            }
        }
        let required = schema.get("required").and_then(Value::as_array);
        for field in required.into_iter().flatten().filter_map(Value::as_str) {
            if fields.get(field).is_none_or(Value::is_null) {
                self.report(path, format!("{field} is missing"));
            }
        }
    }

    fn report_unknown(&mut self, field: &str, known: Option<&Map<String, Value>>, path: &str) {
        let mut names: Vec<&str> = known
            .into_iter()
            .flat_map(Map::keys)
            .map(String::as_str)
            .collect();
        names.sort_unstable();
        let nearest = names.iter().min_by_key(|name| distance(field, name));
        let meant = nearest.filter(|name| distance(field, name) <= 1 + field.len() / 3);
        let meant = meant
            .map(|name| format!("; did you mean {name}?"))
            .unwrap_or_default();
        self.report(
            path,
            format!("unknown field{meant} allowed: {}", names.join(", "))
                .replace("field allowed", "field; allowed"),
        );
    }

    fn check_list(&mut self, items: &[Value], schema: &Value, path: &str) {
        let bound = |name: &str| schema.get(name).and_then(Value::as_u64);
        let length = items.len() as u64;
        if bound("minItems").is_some_and(|least| length < least)
            || bound("maxItems").is_some_and(|most| length > most)
        {
            let (least, most) = (bound("minItems").unwrap_or(0), bound("maxItems"));
            let most = most.map_or_else(|| "more".to_owned(), |most| most.to_string());
            self.report(
                path,
                format!("must have {least} to {most} items; this has {length}"),
            );
        }
        if let Some(schema) = schema.get("items") {
            for (index, item) in items.iter().enumerate() {
                self.check(item, schema, &format!("{path}[{index}]"));
            }
        }
        let keys = schema
            .get("x-kubernetes-list-map-keys")
            .and_then(Value::as_array);
        for key in keys.into_iter().flatten().filter_map(Value::as_str) {
            for (index, item) in items.iter().enumerate() {
                let value = item.get(key);
                if value.is_some()
                    && items[..index]
                        .iter()
                        .any(|earlier| earlier.get(key) == value)
                {
                    let message = format!(
                        "{} occurs twice; it must be unique",
                        value.unwrap_or(&Value::Null)
                    );
                    self.report(&format!("{path}[{index}].{key}"), message);
                }
            }
        }
    }

    fn check_text(&mut self, text: &str, schema: &Value, path: &str) {
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
            && !allowed.iter().any(|allowed| allowed.as_str() == Some(text))
        {
            let allowed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
            return self.report(
                path,
                format!("{text:?} is not allowed; allowed: {}", allowed.join(", ")),
            );
        }
        let length = text.chars().count() as u64;
        let bound = |name: &str| schema.get(name).and_then(Value::as_u64);
        let (least, most) = (
            bound("minLength").unwrap_or(0),
            bound("maxLength").unwrap_or(u64::MAX),
        );
        if !(least..=most).contains(&length) {
            return self.report(
                path,
                format!("must have {least} to {most} characters; this has {length}"),
            );
        }
        let pattern = schema.get("pattern").and_then(Value::as_str);
        let regex = pattern.and_then(|pattern| regex::Regex::new(pattern).ok());
        if regex.is_some_and(|regex| !regex.is_match(text)) {
            let pattern = pattern.unwrap_or_default();
            self.report(path, format!("{text:?} does not match {pattern}"));
        }
    }

    /// Quantities may be numbers, which their schema does not say.
    fn check_quantity(&mut self, value: &Value, path: &str) {
        let is_good = match value {
            Value::Number(_) => true,
            Value::String(text) => regex::Regex::new(QUANTITY)
                .expect("the pattern is fixed")
                .is_match(text),
            _ => false,
        };
        if !is_good {
            let message = format!("must be a quantity, as 2, 500m or 64Mi; this is {value}");
            self.report(path, message);
        }
    }

    fn check_number(&mut self, number: f64, schema: &Value, path: &str) {
        let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
        let (least, most) = (bound("minimum"), bound("maximum"));
        if least.is_some_and(|least| number < least) || most.is_some_and(|most| number > most) {
            let text = |bound: Option<f64>| {
                bound.map_or_else(|| "any".to_owned(), |bound| bound.to_string())
            };
            self.report(
                path,
                format!(
                    "must be {} to {}; this is {number}",
                    text(least),
                    text(most)
                ),
            );
        }
    }
}

/// The everyday name of a JSON type.
fn name(kind: &str) -> &str {
    match kind {
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "text",
        "boolean" => "true or false",
        "array" => "a list",
        "object" => "a group of fields",
        other => other,
    }
}

/// Number of letters that differ, whatever their case.
fn distance(one: &str, another: &str) -> usize {
    strsim::levenshtein(&one.to_lowercase(), &another.to_lowercase())
}
