//! Reads a `ProcessingPool` from a YAML file and says, with file, line and
//! column, what is wrong with it.
//!
//! The schema of the CRD and its rules about several fields (`pool::rules`) are
//! applied, so a manifest that passes here passes the API server. The fields of the
//! pod template are checked too; `tests/it/manifest/odd` compares both.
//!
//! - `located`: YAML with the place of every value; `scalar`: what a scalar is;
//! - `schema`: a value against an OpenAPI schema; `metadata`, `template`: rules that
//!   schemas do not have.

mod located;
mod metadata;
mod scalar;
mod schema;
mod template;

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::CustomResourceExt;
use serde_json::Value;

use self::located::{Document, TextPosition};
use crate::plan::{FieldProblem, ValidPool};
use crate::pool::{ProcessingPool, rules};

/// Largest manifest in bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// The path that stands for standard input, as for `kubectl -f`.
const STANDARD_INPUT: &str = "-";

/// Most problems that are reported at once.
const MAX_PROBLEMS: usize = 20;

/// A problem and its place in the file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocatedProblem {
    /// Line, from 1; 0 when the problem is about the whole file.
    pub line: u64,
    /// Column, from 1; 0 when the problem is about the whole file.
    pub column: u64,
    /// The field, what is wrong with it, and what is allowed.
    pub message: String,
}

impl LocatedProblem {
    /// A problem with the whole file.
    fn of_file(message: String) -> Self {
        Self {
            line: 0,
            column: 0,
            message,
        }
    }
}

/// Why a manifest cannot be used.
#[derive(Debug)]
pub struct ManifestError {
    file: PathBuf,
    problems: Vec<LocatedProblem>,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        for (index, problem) in self.problems.iter().take(MAX_PROBLEMS).enumerate() {
            if index > 0 {
                writeln!(formatter)?;
            }
            match problem {
                LocatedProblem {
                    line: 0, message, ..
                } => write!(formatter, "{file}: {message}")?,
                LocatedProblem {
                    line,
                    column,
                    message,
                } => write!(formatter, "{file}:{line}:{column}: {message}")?,
            }
        }
        let more = self.problems.len().saturating_sub(MAX_PROBLEMS);
        if more > 0 {
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
    /// The fields as they were written.
    #[must_use]
    pub fn fields(&self) -> &Value {
        &self.document.value
    }

    /// An error about the file with `problems` that only the user of the pool can
    /// find. A problem whose path is not that of a field is about the whole file.
    #[must_use]
    pub fn error(&self, problems: Vec<FieldProblem>) -> ManifestError {
        let located = problems.into_iter().map(|problem| {
            let is_field = ["metadata", "spec"]
                .iter()
                .any(|field| problem.path.starts_with(field));
            if is_field {
                locate(&self.document, problem)
            } else {
                LocatedProblem::of_file(format!("{}: {}", problem.path, problem.message))
            }
        });
        ManifestError {
            file: self.file.clone(),
            problems: located.collect(),
        }
    }
}

fn locate(document: &Document, FieldProblem { path, message }: FieldProblem) -> LocatedProblem {
    let TextPosition { line, column } = document.place(&path);
    let field = if path.is_empty() { "manifest" } else { &path };
    LocatedProblem {
        line,
        column,
        message: format!("{field}: {message}"),
    }
}

/// Reads the pool in the file at `path`; `-` is standard input.
///
/// # Errors
/// The file cannot be read, or all problems that were found in it.
pub fn load(path: &Path) -> Result<Manifest, ManifestError> {
    let bytes = read_bytes(path);
    let path = if is_standard_input(path) {
        Path::new("standard input")
    } else {
        path
    };
    let whole = |message: String| ManifestError {
        file: path.to_owned(),
        problems: vec![LocatedProblem::of_file(message)],
    };
    let bytes = bytes.map_err(|error| whole(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(whole(format!(
            "is too large; a manifest has at most {MAX_BYTES} bytes"
        )));
    }
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

/// Whether `path` is `-`, which stands for standard input. That can be read once.
#[must_use]
pub fn is_standard_input(path: &Path) -> bool {
    path == Path::new(STANDARD_INPUT)
}

/// The bytes at `path`: at most one more than [`MAX_BYTES`].
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let source: Box<dyn Read> = if is_standard_input(path) {
        Box::new(io::stdin())
    } else {
        Box::new(std::fs::File::open(path)?)
    };
    source.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads the pool in `text`.
///
/// # Errors
/// Every problem with its place.
pub fn parse(text: &str) -> Result<ValidPool, Vec<LocatedProblem>> {
    read(text).map(|(pool, _)| pool)
}

fn read(text: &str) -> Result<(ValidPool, Document), Vec<LocatedProblem>> {
    let document = Document::parse(text).map_err(|problem| vec![problem])?;
    let locate = |problems: Vec<FieldProblem>| -> Vec<LocatedProblem> {
        let located = problems
            .into_iter()
            .map(|problem| locate(&document, problem));
        located.collect()
    };
    check_kind(&document.value).map_err(|problem| locate(vec![problem]))?;
    let problems = check_fields(&document.value);
    if !problems.is_empty() {
        return Err(locate(problems));
    }
    let mut value = document.value.clone();
    remove_nulls(&mut value);
    let pool: ProcessingPool = serde_json::from_value(value)
        .map_err(|error| locate(vec![FieldProblem::new("", error.to_string())]))?;
    let pool = ValidPool::new(&pool).map_err(&locate)?;
    if let Err(problem) = &pool.template {
        return Err(locate(vec![problem.clone()]));
    }
    Ok((pool, document))
}

/// What in the manifest `value` the API server would refuse, now or when it creates a pod.
fn check_fields(value: &Value) -> Vec<FieldProblem> {
    let mut problems = schema::check(value, &crd_schema(), "");
    let mut generator = schemars::SchemaGenerator::default();
    let object_meta = generator.root_schema_for::<ObjectMeta>();
    let template = generator.into_root_schema_for::<PodTemplateSpec>();
    for (pointer, path, schema) in [
        ("/metadata", "metadata", &object_meta),
        ("/spec/template", "spec.template", &template),
    ] {
        if let Some(part) = value.pointer(pointer) {
            problems.extend(schema::check(part, schema.as_value(), path));
        }
    }
    if !problems.is_empty() {
        return problems;
    }
    for (pointer, path) in [
        ("/metadata", "metadata"),
        ("/spec/template/metadata", "spec.template.metadata"),
    ] {
        if let Some(part) = value.pointer(pointer) {
            problems.extend(metadata::check(part, path));
        }
    }
    if let Some(part) = value.pointer("/spec/template") {
        problems.extend(template::check(part, "spec.template"));
    }
    problems
}

/// Removes empty fields: the API server takes an empty field for an absent one.
fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(remove_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        _ => {}
    }
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

fn check_kind(value: &Value) -> Result<(), FieldProblem> {
    let expect = |field: &str, expected: &str| match value.get(field).and_then(Value::as_str) {
        Some(found) if found == expected => Ok(()),
        Some(found) => Err(FieldProblem::new(
            field,
            format!("must be {expected}; this is {found}"),
        )),
        None => Err(FieldProblem::new(
            "",
            format!("{field}: {expected} is missing"),
        )),
    };
    if !value.is_object() {
        return Err(FieldProblem::new(
            "",
            "must be a ProcessingPool: apiVersion, kind, metadata and spec",
        ));
    }
    expect("kind", "ProcessingPool")?;
    expect("apiVersion", "portpool.dev/v1alpha1")?;
    match value.pointer("/metadata/name").and_then(Value::as_str) {
        Some(name) => match rules::check_name(name).pop() {
            Some(problem) => Err(problem),
            None => Ok(()),
        },
        None => Err(FieldProblem::new("metadata", "name is missing")),
    }
}
