//! A faulty proxy between a controller and the API server. The test decides
//! what happens to each request.
//!
//! Source of the method: Sieve (OSDI '22), which perturbs what a controller
//! sees, not the controller itself.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::Notify;

/// A request that the proxy has received.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: Method,
    pub path: String,
    pub is_watch: bool,
    /// The number of the write, from 1; dry runs, events and leases have none.
    pub write: Option<u64>,
    /// The number of the request, from 1.
    pub number: u64,
}

/// What the proxy does with a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    Pass,
    /// The proxy answers itself; the API server does not see the request.
    Answer(u16, &'static str),
    /// The API server carries it out, and the answer is lost.
    LoseReply,
    /// The API server carries it out. The answer is held back, and
    /// [`Proxy::held`] is notified.
    Hold,
    /// [`Proxy::held`] is notified. The API server receives the request only
    /// after [`Proxy::release`], as if the network had delayed it.
    Late,
    /// The answer is that of the first request for this path.
    Stale,
    /// Each watch is cut after this many events.
    CutWatch(usize),
    /// Watch events of this type are dropped.
    DropEvents(&'static str),
    /// Watch events come this much later.
    DelayEvents(Duration),
}

type Rule = Box<dyn Fn(&Call) -> Fault + Send + Sync>;
type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

/// The proxy and its counters.
pub struct Proxy {
    client: Client,
    rule: Mutex<Rule>,
    first_answers: Mutex<HashMap<String, Bytes>>,
    pub requests: AtomicU64,
    pub writes: AtomicU64,
    /// Successful creations and deletions of pods.
    pub pods_created: AtomicU64,
    pub pods_deleted: AtomicU64,
    pub held: Notify,
    holding: AtomicBool,
    released: Notify,
    delivered: Notify,
    /// Method and path of all requests but reads, including dry runs, events and
    /// leases.
    pub log: Mutex<Vec<String>>,
    pub kubeconfig: PathBuf,
    _folder: tempfile::TempDir,
}

impl Proxy {
    /// Serves until the runtime ends.
    pub async fn start(client: Client) -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        super::cluster::write_kubeconfig(&kubeconfig, &format!("http://{address}"));
        let proxy = Arc::new(Self {
            client,
            rule: Mutex::new(Box::new(|_| Fault::Pass)),
            first_answers: Mutex::default(),
            requests: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            pods_created: AtomicU64::new(0),
            pods_deleted: AtomicU64::new(0),
            held: Notify::new(),
            holding: AtomicBool::new(false),
            released: Notify::new(),
            delivered: Notify::new(),
            log: Mutex::default(),
            kubeconfig,
            _folder: folder,
        });
        let serving = proxy.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let proxy = serving.clone();
                let service = service_fn(move |request| proxy.clone().handle(request));
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                tokio::spawn(async move { drop(connection.await) });
            }
        });
        proxy
    }

    /// Sets the rule for all further requests.
    pub fn rule(&self, rule: impl Fn(&Call) -> Fault + Send + Sync + 'static) {
        *self.rule.lock().unwrap() = Box::new(rule);
    }

    /// Whether a [`Fault::Late`] request waits for [`Self::release`].
    pub fn is_holding(&self) -> bool {
        self.holding.load(Ordering::Relaxed)
    }

    /// Forwards the [`Fault::Late`] request and waits for its answer.
    pub async fn release(&self) {
        self.released.notify_one();
        self.delivered.notified().await;
    }

    /// Waits for `time`; returns how many requests came meanwhile.
    pub async fn requests_within(&self, time: Duration) -> u64 {
        let before = self.requests.load(Ordering::Relaxed);
        tokio::time::sleep(time).await;
        self.requests.load(Ordering::Relaxed) - before
    }

    async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Result<Answer, std::io::Error> {
        let (head, body) = request.into_parts();
        let body = body
            .collect()
            .await
            .map_err(std::io::Error::other)?
            .to_bytes();
        let query = head.uri.query().unwrap_or_default();
        let path = head.uri.path().to_owned();
        let is_write = head.method != Method::GET
            && !query.contains("dryRun")
            && !path.contains("/events")
            && !path.contains("/leases");
        let call = Call {
            is_watch: query.contains("watch=true"),
            write: is_write.then(|| self.writes.fetch_add(1, Ordering::Relaxed) + 1),
            number: self.requests.fetch_add(1, Ordering::Relaxed) + 1,
            method: head.method.clone(),
            path,
        };
        if head.method != Method::GET {
            let entry = format!("{} {}", head.method, head.uri);
            self.log.lock().unwrap().push(entry);
        }
        let fault = (self.rule.lock().unwrap())(&call);
        if let Fault::Answer(code, reason) = fault {
            return Ok(refusal(code, reason));
        }
        if fault == Fault::Stale
            && let Some(answer) = self.first_answers.lock().unwrap().get(&call.path)
        {
            return Ok(full(200, answer.clone()));
        }
        let mut upstream = Request::builder().method(head.method).uri(head.uri);
        for (name, value) in &head.headers {
            if name != http::header::HOST && name != http::header::AUTHORIZATION {
                upstream = upstream.header(name, value);
            }
        }
        let upstream = upstream.body(Body::from(body.to_vec())).unwrap();
        // A task of its own, which outlives the connection of a killed controller.
        let (proxy, counted) = (self.clone(), call.clone());
        let is_late = fault == Fault::Late;
        let sending = tokio::spawn(async move {
            if is_late {
                proxy.holding.store(true, Ordering::Relaxed);
                proxy.held.notify_one();
                proxy.released.notified().await;
            }
            let answer = proxy.client.send(upstream).await;
            let is_success = answer
                .as_ref()
                .is_ok_and(|answer| answer.status().is_success());
            proxy.count(&counted, is_success);
            if is_late {
                proxy.delivered.notify_one();
            }
            answer
        });
        let answer = sending.await.unwrap().map_err(std::io::Error::other)?;
        match fault {
            Fault::LoseReply => Err(std::io::Error::other("the answer is lost")),
            Fault::Hold => {
                self.held.notify_one();
                std::future::pending::<Infallible>().await;
                unreachable!("a pending future never completes")
            }
            fault if call.is_watch => Ok(watch(answer, fault)),
            _ => {
                let code = answer.status().as_u16();
                let kind = answer.headers().get(http::header::CONTENT_TYPE).cloned();
                let bytes = answer
                    .into_body()
                    .collect()
                    .await
                    .map_err(std::io::Error::other)?
                    .to_bytes();
                if call.method == Method::GET {
                    self.first_answers
                        .lock()
                        .unwrap()
                        .entry(call.path)
                        .or_insert_with(|| bytes.clone());
                }
                let mut answer = full(code, bytes);
                if let Some(kind) = kind {
                    answer
                        .headers_mut()
                        .insert(http::header::CONTENT_TYPE, kind);
                }
                Ok(answer)
            }
        }
    }

    fn count(&self, call: &Call, is_success: bool) {
        if is_success && call.write.is_some() && call.path.contains("/pods") {
            let counter = match call.method {
                Method::POST => &self.pods_created,
                Method::DELETE => &self.pods_deleted,
                _ => return,
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn full(code: u16, bytes: Bytes) -> Answer {
    let body = Full::new(bytes)
        .map_err(|never: Infallible| match never {})
        .boxed_unsync();
    Response::builder().status(code).body(body).unwrap()
}

fn refusal(code: u16, reason: &str) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": format!("{reason}, says the faulty proxy"), "metadata": {},
    });
    full(code, status.to_string().into())
}

/// The answer to a watch, whose events (one per line) the fault changes.
fn watch(answer: Response<Body>, fault: Fault) -> Answer {
    let mut rest = BytesMut::new();
    let mut seen = 0;
    let code = answer.status();
    let stream = answer
        .into_body()
        .into_data_stream()
        .flat_map(move |chunk| {
            rest.extend_from_slice(&chunk.unwrap_or_default());
            let mut lines = Vec::new();
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                lines.push(rest.split_to(end + 1).freeze());
            }
            futures::stream::iter(lines)
        });
    let stream = stream.filter_map(move |line| {
        let kind = serde_json::from_slice::<Value>(&line).unwrap_or_default()["type"].clone();
        let fault = fault.clone();
        seen += 1;
        async move {
            match fault {
                Fault::DropEvents(dropped) if kind == dropped => None,
                Fault::CutWatch(most) if seen > most => Some(Err(std::io::Error::other("cut"))),
                Fault::DelayEvents(by) => {
                    tokio::time::sleep(by).await;
                    Some(Ok(Frame::data(line)))
                }
                _ => Some(Ok(Frame::data(line))),
            }
        }
    });
    let body = BodyExt::boxed_unsync(StreamBody::new(stream));
    Response::builder().status(code).body(body).unwrap()
}
