//! Reads a `ProcessingPool` from a YAML file and says, with file, line and
//! column, what is wrong with it.
//!
//! The CRD's own schema and CEL rules are applied, so a manifest that passes
//! here passes the API server; then what no schema can say (`plan::ValidPool`)
//! and the pod template's fields are checked too.
//!
//! - `located`: YAML with the place of every value;
//! - `schema`: a value against an OpenAPI schema.

mod located;
mod schema;

use std::fmt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use kube::core::cel::Validator;
use serde_json::Value;

use self::located::Document;
use crate::plan::{Problem, ValidPool};
use crate::pool::ProcessingPool;

/// Largest manifest in bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// Most problems that are reported at once.
const MAX_PROBLEMS: usize = 20;

/// Line, column and message of a problem; line 0 where the whole file is meant.
pub type Located = (u64, u64, String);

/// Why a manifest cannot be used.
#[derive(Debug)]
pub struct ManifestError {
    file: PathBuf,
    problems: Vec<Located>,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        for (index, (line, column, message)) in self.problems.iter().take(MAX_PROBLEMS).enumerate()
        {
            if index > 0 {
                writeln!(formatter)?;
            }
            match line {
                0 => write!(formatter, "{file}: {message}")?,
                _ => write!(formatter, "{file}:{line}:{column}: {message}")?,
            }
        }
        if let Some(more) = self
            .problems
            .len()
            .checked_sub(MAX_PROBLEMS)
            .filter(|more| *more > 0)
        {
            write!(formatter, "\n{file}: and {more} more")?;
        }
        Ok(())
    }
}

impl std::error::Error for ManifestError {}

/// The custom resource definition of `ProcessingPool`.
#[must_use]
pub fn crd() -> CustomResourceDefinition {
    ProcessingPool::crd()
}

/// The same as YAML, for `kubectl apply`.
#[must_use]
pub fn crd_yaml() -> String {
    serde_saphyr::to_string(&crd()).expect("a definition is plain data")
}

/// A pool read from a file.
#[derive(Debug)]
pub struct Manifest {
    /// The pool.
    pub pool: ValidPool,
    file: PathBuf,
    document: Document,
}

impl Manifest {
    /// An error about the file: problems that only who uses the pool can find.
    /// One whose path is no field's stands for the whole file.
    #[must_use]
    pub fn error(&self, problems: Vec<Problem>) -> ManifestError {
        let located = problems.into_iter().map(|problem| {
            let is_field = ["metadata", "spec"]
                .iter()
                .any(|field| problem.path.starts_with(field));
            match is_field {
                true => locate(&self.document, problem),
                false => (0, 0, format!("{}: {}", problem.path, problem.message)),
            }
        });
        ManifestError {
            file: self.file.clone(),
            problems: located.collect(),
        }
    }
}

fn locate(document: &Document, Problem { path, message }: Problem) -> Located {
    let (line, column) = document.place(&path);
    let field = if path.is_empty() { "manifest" } else { &path };
    (line, column, format!("{field}: {message}"))
}

/// Reads the pool in the file at `path`.
///
/// # Errors
/// [`ManifestError`], with every problem found.
pub fn load(path: &Path) -> Result<Manifest, ManifestError> {
    let whole = |message: String| ManifestError {
        file: path.to_owned(),
        problems: vec![(0, 0, message)],
    };
    let size = std::fs::metadata(path)
        .map_err(|error| whole(format!("cannot be read: {error}")))?
        .len();
    if size > MAX_BYTES {
        return Err(whole(format!(
            "has {size} bytes; a manifest has at most {MAX_BYTES}"
        )));
    }
    let bytes = std::fs::read(path).map_err(|error| whole(format!("cannot be read: {error}")))?;
    let text =
        String::from_utf8(bytes).map_err(|error| whole(format!("is not UTF-8 text: {error}")))?;
    match read(&text) {
        Ok((pool, document)) => Ok(Manifest {
            pool,
            file: path.to_owned(),
            document,
        }),
        Err(mut problems) => {
            problems.sort();
            problems.dedup();
            Err(ManifestError {
                file: path.to_owned(),
                problems,
            })
        }
    }
}

/// Reads the pool in `text`.
///
/// # Errors
/// Line, column and message of every problem.
pub fn parse(text: &str) -> Result<ValidPool, Vec<Located>> {
    read(text).map(|(pool, _)| pool)
}

fn read(text: &str) -> Result<(ValidPool, Document), Vec<Located>> {
    let document = Document::parse(text).map_err(|problem| vec![problem])?;
    let locate = |problems: Vec<Problem>| -> Vec<Located> {
        let located = problems
            .into_iter()
            .map(|problem| locate(&document, problem));
        located.collect()
    };
    check_kind(&document.value).map_err(|problem| locate(vec![problem]))?;
    let crd_schema = crd_schema();
    let mut problems = schema::check(&document.value, &crd_schema, "");
    if let Some(template) = document.value.pointer("/spec/template") {
        let template_schema =
            schemars::SchemaGenerator::default().into_root_schema_for::<PodTemplateSpec>();
        problems.extend(schema::check(
            template,
            template_schema.as_value(),
            "spec.template",
        ));
    }
    if !problems.is_empty() {
        return Err(locate(problems));
    }
    let pool: ProcessingPool = serde_json::from_value(document.value.clone())
        .map_err(|error| locate(vec![Problem::new("", error.to_string())]))?;
    // With defaults in place, as in the API server.
    let object = serde_json::to_value(&pool)
        .map_err(|error| locate(vec![Problem::new("", error.to_string())]))?;
    // First, because it names the entry.
    let pool = ValidPool::new(&pool).map_err(&locate)?;
    if let Err(errors) = Validator::new().validate(&crd_schema, &object, None) {
        let broken = errors.into_vec().into_iter();
        return Err(locate(
            broken
                .map(|error| Problem::new(error.field_path, error.message))
                .collect(),
        ));
    }
    if let Err(problem) = &pool.template {
        return Err(locate(vec![problem.clone()]));
    }
    Ok((pool, document))
}

fn crd_schema() -> Value {
    let crd = crd();
    let version = crd
        .spec
        .versions
        .first()
        .and_then(|version| version.schema.clone());
    let schema = version.and_then(|schema| schema.open_api_v3_schema);
    let mut schema = serde_json::to_value(schema).expect("a schema is plain data");
    // The API server adds these to every resource's schema.
    for (field, kind) in [
        ("apiVersion", "string"),
        ("kind", "string"),
        ("metadata", "object"),
    ] {
        schema["properties"][field] = serde_json::json!({ "type": kind });
    }
    schema
}

fn check_kind(value: &Value) -> Result<(), Problem> {
    let expect = |field: &str, expected: &str| match value.get(field).and_then(Value::as_str) {
        Some(found) if found == expected => Ok(()),
        Some(found) => Err(Problem::new(
            field,
            format!("must be {expected}; this is {found}"),
        )),
        None => Err(Problem::new("", format!("{field}: {expected} is missing"))),
    };
    if !value.is_object() {
        return Err(Problem::new(
            "",
            "must be a ProcessingPool: apiVersion, kind, metadata and spec",
        ));
    }
    expect("kind", "ProcessingPool")?;
    expect("apiVersion", "portpool.dev/v1alpha1")?;
    match value.pointer("/metadata/name").and_then(Value::as_str) {
        Some(name) if is_name(name) => Ok(()),
        // The schema's own rule says the same, but cannot say where.
        Some(name) => Err(Problem::new(
            "metadata.name",
            format!(
                "must have 1 to 52 lower-case letters, digits and hyphens, begin with a letter and not end with a hyphen; this is {name:?}"
            ),
        )),
        None => Err(Problem::new("metadata", "name is missing")),
    }
}

fn is_name(name: &str) -> bool {
    let is_allowed =
        |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-';
    (1..=52).contains(&name.len())
        && name.chars().all(is_allowed)
        && name.starts_with(|letter: char| letter.is_ascii_lowercase())
        && !name.ends_with('-')
}
