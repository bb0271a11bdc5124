//! Metadata: strings that a client sends with its request for the workload of
//! its session. portpool passes them on and does not read them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};
use utoipa::openapi::schema::{Object, ObjectBuilder, SchemaType, Type};

/// Most bytes of all keys and values together: enough for names, a seed and a
/// token; more belongs on the connection.
pub const MAX_METADATA_BYTES: usize = 4096;

/// Most keys. Each takes memory of its own, some hundred bytes, however short it is.
pub const MAX_METADATA_KEYS: usize = 64;

/// Most characters of a key that an error shows.
const SHOWN_CHARACTERS: usize = 40;

/// Strings by key: at most [`MAX_METADATA_KEYS`], and [`MAX_METADATA_BYTES`] in all keys
/// and values. Cheap to clone, and without allocation when empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Metadata(Option<Arc<BTreeMap<String, String>>>);

/// There is more than there may be; each has the number that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// More keys than [`MAX_METADATA_KEYS`].
    #[error("metadata: there must be at most {MAX_METADATA_KEYS} keys; these are {0}")]
    Keys(usize),
    /// More bytes than [`MAX_METADATA_BYTES`] in all keys and values.
    #[error(
        "metadata: all keys and values must have at most {MAX_METADATA_BYTES} bytes together; these have {0}"
    )]
    Bytes(usize),
}

impl MetadataError {
    fn check(keys: usize, bytes: usize) -> Result<(), Self> {
        if keys > MAX_METADATA_KEYS {
            return Err(Self::Keys(keys));
        }
        if bytes > MAX_METADATA_BYTES {
            return Err(Self::Bytes(bytes));
        }
        Ok(())
    }
}

impl Metadata {
    /// The metadata with these keys and values. Of a key that occurs twice, the last
    /// value counts.
    ///
    /// # Errors
    /// [`MetadataError`] if they are too large.
    pub fn new<K: Into<String>, V: Into<String>>(
        entries: impl IntoIterator<Item = (K, V)>,
    ) -> Result<Self, MetadataError> {
        let entries = entries.into_iter();
        Self::try_from(
            entries
                .map(|(key, value)| (key.into(), value.into()))
                .collect::<BTreeMap<_, _>>(),
        )
    }

    /// Whether there are no keys.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.as_ref()?.get(key).map(String::as_str)
    }

    /// The keys with their values, in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let entries = self.0.iter().flat_map(|entries| entries.iter());
        entries.map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The number of keys.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.0.as_ref().map_or(0, |entries| entries.len())
    }

    /// The number of bytes in all keys and values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.iter()
            .map(|(key, value)| key.len() + value.len())
            .sum()
    }
}

/// A change of metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetadataPatch {
    /// All keys are removed.
    Clear,
    /// Keys are set to these values, or removed (`None`): at most
    /// [`MAX_METADATA_KEYS`], and [`MAX_METADATA_BYTES`] in all keys and values. The
    /// other keys stay.
    Merge(BTreeMap<String, Option<String>>),
}

impl MetadataPatch {
    /// The change that sets and removes the keys of `entries`.
    ///
    /// # Errors
    /// [`MetadataError`] if they are too large.
    pub fn merge(entries: BTreeMap<String, Option<String>>) -> Result<Self, MetadataError> {
        let length = |(key, value): (&String, &Option<String>)| {
            key.len() + value.as_ref().map_or(0, String::len)
        };
        MetadataError::check(entries.len(), entries.iter().map(length).sum())?;
        Ok(Self::Merge(entries))
    }
}

impl Metadata {
    /// The metadata after `patch` (RFC 7396).
    ///
    /// # Errors
    /// [`MetadataError`] if it is too large then.
    pub fn amended(&self, patch: &MetadataPatch) -> Result<Self, MetadataError> {
        let MetadataPatch::Merge(changes) = patch else {
            return Ok(Self::default());
        };
        let mut entries = BTreeMap::from(self.clone());
        for (key, value) in changes {
            match value {
                Some(value) => entries.insert(key.clone(), value.clone()),
                None => entries.remove(key),
            };
        }
        Self::try_from(entries)
    }
}

impl TryFrom<BTreeMap<String, String>> for Metadata {
    type Error = MetadataError;

    fn try_from(entries: BTreeMap<String, String>) -> Result<Self, MetadataError> {
        if entries.is_empty() {
            return Ok(Self::default());
        }
        let metadata = Self(Some(Arc::new(entries)));
        MetadataError::check(metadata.keys(), metadata.bytes())?;
        Ok(metadata)
    }
}

impl From<Metadata> for BTreeMap<String, String> {
    fn from(metadata: Metadata) -> Self {
        let entries = metadata.0.map(Arc::unwrap_or_clone);
        entries.unwrap_or_default()
    }
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut entries = BTreeMap::new();
        for (key, value) in deserializer.deserialize_map(Entries)? {
            let value = value.ok_or_else(|| D::Error::custom(no_string(&key)))?;
            entries.insert(key, value);
        }
        Self::try_from(entries).map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for MetadataPatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let entries = deserializer.deserialize_map(Entries)?;
        Self::merge(entries).map_err(D::Error::custom)
    }
}

impl Serialize for MetadataPatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Clear => serializer.serialize_none(),
            Self::Merge(entries) => entries.serialize(serializer),
        }
    }
}

/// The OpenAPI schema of metadata in a request. Derived ones do not bound the keys.
pub(super) fn schema() -> Object {
    let text = "Strings for the workload, which sees them at its agent's local API: at most\n64 keys, and 4096 bytes in all keys and values. Under one idempotency key,\nthose of the request that made the session count.";
    object(Type::String.into(), text)
        .default(Some(json!({})))
        .build()
}

/// The OpenAPI schema of a patch.
pub(super) fn patch_schema() -> Object {
    let text = "Strings for the workload to set by key, or null to remove one; null removes all.\nAt most 64 keys; what is left has at most 64 keys, and 4096 bytes in all keys and\nvalues.";
    let or_null = |of| SchemaType::from_iter([of, Type::Null]);
    object(or_null(Type::String), text)
        .schema_type(or_null(Type::Object))
        .build()
}

/// An object with values of the type `of`.
fn object(of: SchemaType, description: &str) -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .description(Some(description))
        .max_properties(Some(MAX_METADATA_KEYS))
        .additional_properties(Some(ObjectBuilder::new().schema_type(of)))
}

/// Reads an object of strings and nulls. Its errors name the field, which those of
/// derived code do not.
struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = BTreeMap<String, Option<String>>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of strings for metadata")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, Value>()? {
            let value = match value {
                Value::String(value) => Some(value),
                Value::Null => None,
                _ => return Err(A::Error::custom(no_string(&key))),
            };
            if entries.contains_key(&key) {
                let message = format!("metadata: the key {} occurs twice", shown(&key));
                return Err(A::Error::custom(message));
            }
            entries.insert(key, value);
        }
        Ok(entries)
    }
}

fn no_string(key: &str) -> String {
    format!("metadata: the value of {} must be a string", shown(key))
}

/// A key as an error shows it.
fn shown(key: &str) -> String {
    let start: String = key.chars().take(SHOWN_CHARACTERS).collect();
    format!("{start:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_written_as_it_was_read() {
        let text = r#"{"map":"harbor","player":"ada"}"#;
        let metadata: Metadata = serde_json::from_str(text).unwrap();
        assert_eq!(metadata.get("map"), Some("harbor"));
        assert_eq!(metadata.bytes(), 18);
        assert_eq!(serde_json::to_string(&metadata).unwrap(), text);
        let built = Metadata::new([("player", "ada"), ("map", "harbor")]);
        assert_eq!(built, Ok(metadata));
        let empty: Metadata = serde_json::from_str("{}").unwrap();
        assert_eq!((&empty, empty.is_empty()), (&Metadata::default(), true));
        assert_eq!(serde_json::to_string(&empty).unwrap(), "{}");
    }

    #[test]
    fn the_bound_counts_the_bytes_of_all_keys_and_values() {
        // Two bytes for each letter.
        let value = "\u{e9}".repeat(2_047);
        assert!(Metadata::new([("ab", value.as_str())]).is_ok());
        let error = Metadata::new([("a", ""), ("ab", value.as_str())]).unwrap_err();
        assert_eq!(error, MetadataError::Bytes(4_097));
        assert!(error.to_string().contains("at most 4096 bytes"), "{error}");
    }

    /// Many short keys take far more memory than their bytes.
    #[test]
    fn the_bound_counts_keys_too() {
        let keys = |count: usize| (0..count).map(|key| (format!("{key:02}"), String::new()));
        let full = Metadata::new(keys(64)).unwrap();
        assert_eq!((full.keys(), full.bytes()), (64, 128));
        let error = Metadata::new(keys(65)).unwrap_err();
        assert_eq!(error, MetadataError::Keys(65));
        assert!(
            error.to_string().contains("at most 64 keys; these are 65"),
            "{error}"
        );
        let removal =
            |count| MetadataPatch::merge(keys(count).map(|(key, _)| (key, None)).collect());
        assert_eq!(removal(65), Err(MetadataError::Keys(65)));
        assert_eq!(full.amended(&removal(64).unwrap()), Ok(Metadata::default()));
        let one_more = [("more".to_owned(), Some(String::new()))];
        let one_more = MetadataPatch::merge(one_more.into()).unwrap();
        assert_eq!(full.amended(&one_more), Err(MetadataError::Keys(65)));
    }

    #[test]
    fn a_patch_sets_and_removes_keys_and_leaves_the_others() {
        let metadata = Metadata::new([("map", "harbor"), ("player", "ada")]).unwrap();
        let amended = |patch: &str| {
            let patch: MetadataPatch = serde_json::from_str(patch).unwrap();
            metadata
                .amended(&patch)
                .map(|it| serde_json::to_string(&it).unwrap())
        };
        for (patch, expected) in [
            ("{}", r#"{"map":"harbor","player":"ada"}"#),
            (r#"{"map":null,"none":null}"#, r#"{"player":"ada"}"#),
            (
                r#"{"map":"sea","seed":""}"#,
                r#"{"map":"sea","player":"ada","seed":""}"#,
            ),
        ] {
            assert_eq!(amended(patch).as_deref(), Ok(expected));
        }
        let cleared = metadata.amended(&MetadataPatch::Clear);
        assert_eq!(cleared, Ok(Metadata::default()));
        // It fits by itself, and not with what is there.
        let large = format!(r#"{{"k":"{}"}}"#, "v".repeat(4_095));
        assert_eq!(amended(&large), Err(MetadataError::Bytes(4_114)));
        let larger = format!(r#"{{"k":"{}"}}"#, "v".repeat(4_096));
        assert!(serde_json::from_str::<MetadataPatch>(&larger).is_err());
    }

    #[test]
    fn what_is_no_object_of_strings_is_refused_with_the_field() {
        let long = format!(r#"{{"{}":1}}"#, "k".repeat(1_000));
        for (text, words) in [
            ("[]", "an object of strings for metadata"),
            ("null", "an object of strings for metadata"),
            (r#""text""#, "an object of strings for metadata"),
            (
                r#"{"a":1}"#,
                r#"metadata: the value of "a" must be a string"#,
            ),
            (r#"{"a":null}"#, "must be a string"),
            (r#"{"a":{"b":"c"}}"#, "must be a string"),
            (
                r#"{"a":"1","a":"2"}"#,
                r#"metadata: the key "a" occurs twice"#,
            ),
            (&long, "must be a string"),
        ] {
            let error = serde_json::from_str::<Metadata>(text).unwrap_err();
            let error = error.to_string();
            assert!(
                error.contains(words) && error.len() < 150,
                "{text:.60}: {error}"
            );
        }
    }
}
