//! The value of a YAML scalar as Kubernetes reads it: YAML 1.1 as far as
//! sigs.k8s.io/yaml knows it. `0644` is an octal number, `yes` is true, and a
//! tag that nobody knows makes text.
//!
//! Source: go.yaml.in/yaml v2.4, `resolve.go`, which kubectl and the API server
//! read manifests with.

use granit_parser::Tag;
use serde_json::Value;

/// The namespace of the tags that `!!` stands for.
const NAMESPACE: &str = "tag:yaml.org,2002:";

/// The value of a scalar.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scalar {
    Null,
    Bool(bool),
    /// Any `i64` or `u64`.
    Integer(i128),
    Float(f64),
    Text(String),
}

impl Scalar {
    /// Reads `text`. A scalar that is not plain, such as a quoted one, is text
    /// unless its tag says otherwise.
    ///
    /// # Errors
    /// What is wrong, when `text` is not what its tag says.
    pub(super) fn read(text: &str, is_plain: bool, tag: Option<&Tag>) -> Result<Self, String> {
        let Some(tag) = tag else {
            return Ok(if is_plain {
                Self::guess(text)
            } else {
                Self::Text(text.to_owned())
            });
        };
        let kind = tag.suffix_in_namespace(NAMESPACE).unwrap_or_default();
        let value = Self::guess(text);
        let fits = match &*kind {
            "null" => value == Self::Null,
            "bool" => matches!(value, Self::Bool(_)),
            "int" => matches!(value, Self::Integer(_)),
            "float" => matches!(value, Self::Integer(_) | Self::Float(_)),
            "binary" => return Err("!!binary is not read: give text".to_owned()),
            _ => return Ok(Self::Text(text.to_owned())),
        };
        if fits {
            Ok(value)
        } else {
            Err(format!("{text:?} is not what its tag !!{kind} says"))
        }
    }

    /// What plain `text` stands for.
    fn guess(text: &str) -> Self {
        match text {
            "" | "~" | "null" | "Null" | "NULL" => Self::Null,
            "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
                Self::Bool(true)
            }
            "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off"
            | "OFF" => Self::Bool(false),
            ".nan" | ".NaN" | ".NAN" => Self::Float(f64::NAN),
            ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => Self::Float(f64::INFINITY),
            "-.inf" | "-.Inf" | "-.INF" => Self::Float(f64::NEG_INFINITY),
            _ => Self::number(text).unwrap_or_else(|| Self::Text(text.to_owned())),
        }
    }

    fn number(text: &str) -> Option<Self> {
        if !text.starts_with(|first: char| first.is_ascii_digit() || "+-.".contains(first)) {
            return None;
        }
        let digits = text.replace('_', "");
        if let Some(integer) = integer(&digits) {
            return Some(Self::Integer(integer));
        }
        // Neither `inf` nor `nan`, which Rust would take.
        let is_decimal = |digit: char| digit.is_ascii_digit() || ".eE+-".contains(digit);
        let float = digits.parse().ok().filter(|value: &f64| value.is_finite());
        let float = float.filter(|_| digits.chars().all(is_decimal));
        float.map(Self::Float)
    }

    /// The value in JSON, where a whole number is an integer however it was
    /// written; `None` for numbers that JSON does not have.
    pub(super) fn to_json(&self) -> Option<Value> {
        Some(match self {
            Self::Null => Value::Null,
            Self::Bool(value) => (*value).into(),
            Self::Integer(value) => from_integer(*value)?,
            Self::Float(value) if !value.is_finite() => return None,
            #[allow(
                clippy::cast_possible_truncation,
                reason = "the value is whole and in range"
            )]
            Self::Float(value) if value.fract() == 0.0 && value.abs() < 9e18 => {
                from_integer(*value as i128)?
            }
            Self::Float(value) => (*value).into(),
            Self::Text(text) => text.as_str().into(),
        })
    }

    /// The scalar as the key of a JSON object; `None` for null.
    pub(super) fn to_key(&self) -> Option<String> {
        match self {
            Self::Null => None,
            Self::Bool(value) => Some(value.to_string()),
            Self::Integer(value) => Some(value.to_string()),
            Self::Float(value) => Some(value.to_string()),
            Self::Text(text) => Some(text.clone()),
        }
    }
}

fn from_integer(value: i128) -> Option<Value> {
    let signed = i64::try_from(value).map(Value::from);
    signed
        .or_else(|_| u64::try_from(value).map(Value::from))
        .ok()
}

/// An integer in the notation of Go: `0x1f`, `0b11`, `0o17` and `017`.
fn integer(text: &str) -> Option<i128> {
    let (is_negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let prefixes = [("0x", 16), ("0b", 2), ("0o", 8), ("0", 8)];
    let found = prefixes.iter().find_map(|(prefix, radix)| {
        let rest = lower.strip_prefix(prefix)?;
        (!rest.is_empty()).then_some((rest, *radix))
    });
    let (digits, radix) = found.unwrap_or((&lower, 10));
    // A second sign would be taken.
    if !digits.chars().all(|digit| digit.is_ascii_alphanumeric()) {
        return None;
    }
    let value = i128::from(u64::from_str_radix(digits, radix).ok()?);
    let value = if is_negative { -value } else { value };
    (value >= i128::from(i64::MIN)).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn plain_scalars_are_what_kubernetes_reads() {
        // Printed by `kubectl patch --local -p '{}' -o json`, version 1.36.
        let cases = [
            ("0644", json!(420)),
            ("0o17", json!(15)),
            ("0x1F", json!(31)),
            ("0b101", json!(5)),
            ("08", json!(8)),
            ("7_000", json!(7000)),
            ("+7", json!(7)),
            ("-0x10", json!(-16)),
            ("2.592e+06", json!(2_592_000)),
            ("1e3", json!(1000)),
            ("2.0", json!(2)),
            (".5", json!(0.5)),
            ("1.5", json!(1.5)),
            ("yes", json!(true)),
            ("n", json!(false)),
            ("Off", json!(false)),
            ("yEs", json!("yEs")),
            ("~", json!(null)),
            ("", json!(null)),
            ("1.2.3", json!("1.2.3")),
            ("12:30:45", json!("12:30:45")),
            ("2001-01-01", json!("2001-01-01")),
            ("+inf", json!("+inf")),
            ("-", json!("-")),
            ("--7", json!("--7")),
            ("0x", json!("0x")),
            ("_1", json!("_1")),
            ("1e400", json!("1e400")),
            ("1_0.5", json!(10.5)),
            ("0_7", json!(7)),
            ("0b", json!("0b")),
            ("64Mi", json!("64Mi")),
        ];
        for (text, expected) in cases {
            let value = Scalar::read(text, true, None).unwrap();
            assert_eq!(value.to_json(), Some(expected), "{text:?}");
            let quoted = Scalar::read(text, false, None).unwrap();
            assert_eq!(quoted.to_json(), Some(json!(text)));
        }
        for text in [".inf", "-.INF", ".nan"] {
            assert_eq!(Scalar::guess(text).to_json(), None, "{text}");
        }
    }

    #[test]
    fn a_tag_decides_and_an_unknown_one_makes_text() {
        let core = |name: &str| Tag::new(NAMESPACE, name);
        let read = |text, tag: &Tag| Scalar::read(text, true, Some(tag));
        assert_eq!(
            read("1", &Tag::new("!", "vault")),
            Ok(Scalar::Text("1".to_owned()))
        );
        assert_eq!(read("5", &core("str")), Ok(Scalar::Text("5".to_owned())));
        assert_eq!(read("5", &core("float")), Ok(Scalar::Integer(5)));
        assert_eq!(
            Scalar::read("3", false, Some(&core("int"))),
            Ok(Scalar::Integer(3))
        );
        for (text, name) in [
            ("many", "int"),
            ("1.5", "int"),
            ("1", "bool"),
            ("x", "null"),
        ] {
            assert!(read(text, &core(name)).is_err(), "{text} {name}");
        }
        assert!(read("aGk=", &core("binary")).is_err());
    }
}
