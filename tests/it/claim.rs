//! US 8,544,018 B2, claim 1, element by element, against the running parts.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;

use crate::common::{COUNT, Pool, SOON, connect, echo};
use futures::{Stream, StreamExt};
use portpool::selection::PROTOCOL_VERSION;
use portpool::selection::v1::selection_client::SelectionClient;
use portpool::selection::v1::selection_server::{Selection, SelectionServer};
use portpool::selection::v1::{self, FromAgent, ToAgent, from_agent, to_agent};
use portpool::session::{SessionRequest, SessionState};
use portpool::table::Table;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};

async fn page(address: SocketAddr, path: &str) -> String {
    let path = path.to_owned();
    let get = move || {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    };
    tokio::task::spawn_blocking(get).await.unwrap()
}

#[tokio::test]
async fn n_processing_servers_take_sessions() {
    let pool = Pool::running(3, |_| {}).await;
    let mut servers = HashSet::new();
    for _ in 0..3 {
        servers.insert(pool.request().await.unwrap().server);
    }
    assert_eq!(servers.len(), 3, "each of the N servers got one");
}

#[tokio::test]
async fn connection_server_has_a_plurality_of_connection_ports() {
    let pool = Pool::running(2, |_| {}).await;
    let (mut ports, mut streams) = (HashSet::new(), Vec::new());
    for _ in 0..2 * COUNT {
        let session = pool.request().await.unwrap();
        let mut stream = connect(&session);
        echo(&mut stream, "through a connection port");
        ports.insert(session.port);
        streams.push(stream);
    }
    assert_eq!(ports.len(), usize::from(2 * COUNT));
}

#[tokio::test]
async fn first_receiving_part_takes_request_information_at_the_load_sharing_port() {
    let pool = Pool::running(2, |_| {}).await;
    let request = r#"{"protocol":"UDP","portName":"main"}"#;
    let mut stream = TcpStream::connect((pool.connection_address(0), 7700)).unwrap();
    write!(stream, "POST /v1/sessions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{request}", request.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 201"),
        "any HTTP client will do: {answer}"
    );
}

#[tokio::test]
async fn load_sharing_part_allocates_the_destination() {
    let pool = Pool::running(2, |_| {}).await;
    let first = pool.request().await.unwrap();
    let second = pool.request().await.unwrap();
    assert_ne!(
        first.server, second.server,
        "the server with the fewest sessions"
    );
}

#[tokio::test]
async fn storage_part_holds_the_pre_determined_relationship() {
    let pool = Pool::running(2, |_| {}).await;
    let at_connection_server = page(
        SocketAddr::new(pool.connection_address(0), 7701),
        "/v1/port-table",
    )
    .await;
    assert_eq!(Table::decode(&at_connection_server).unwrap(), pool.table);
    let session = pool.request().await.unwrap();
    let (row, (_, target)) = pool
        .table
        .rows
        .iter()
        .find_map(|row| {
            Some((
                row,
                row.find(portpool::table::ListenPort::new(session.port)?)?,
            ))
        })
        .unwrap();
    assert_eq!(session.server, row.server);
    assert!(
        (crate::common::SERVER_PORT..crate::common::SERVER_PORT + COUNT).contains(&target.get())
    );
}

/// A processing server of our own, which always selects the last connection
/// port of its row and records the requests that it receives.
#[derive(Clone)]
struct LastPort(mpsc::UnboundedSender<v1::Select>);

#[tonic::async_trait]
impl Selection for LastPort {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<FromAgent, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<ToAgent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut incoming = request.into_inner();
        let (sender, outgoing) = mpsc::unbounded_channel();
        let asked = self.0.clone();
        let send = move |message| {
            sender
                .send(Ok(FromAgent {
                    message: Some(message),
                }))
                .unwrap()
        };
        tokio::spawn(async move {
            let mut last = 0;
            let counts = |free| v1::Counts {
                ports: vec![v1::PortCounts {
                    name: "main".to_owned(),
                    protocol: "TCPUDP".to_owned(),
                    free,
                    held: 4 - free,
                    ..v1::PortCounts::default()
                }],
                ..v1::Counts::default()
            };
            while let Ok(Some(ToAgent {
                message: Some(message),
            })) = incoming.message().await
            {
                match message {
                    to_agent::Message::Hello(hello) => {
                        let table = Table::decode(&hello.table).unwrap();
                        let ports = table.rows[0].ranges[0].connection_ports();
                        last = ports.last().unwrap().get();
                        send(from_agent::Message::Welcome(v1::Welcome {
                            protocol_version: PROTOCOL_VERSION,
                            agent: "ours".to_owned(),
                            generation: table.generation,
                            several_ports: false,
                            amendments: false,
                        }));
                        send(from_agent::Message::Counts(counts(4)));
                    }
                    to_agent::Message::Select(select) => {
                        let session = v1::Session {
                            session_id: select.session_id.clone(),
                            connection_port: last.into(),
                            port_name: "main".to_owned(),
                            protocol: "TCPUDP".to_owned(),
                            state: v1::session::State::Held.into(),
                            ..v1::Session::default()
                        };
                        let request_id = select.request_id;
                        asked.send(select).unwrap();
                        send(from_agent::Message::Selected(v1::Selected {
                            request_id,
                            session: Some(session),
                            counts: Some(counts(3)),
                        }));
                    }
                    _ => {}
                }
            }
        });
        Ok(Response::new(
            UnboundedReceiverStream::new(outgoing).boxed(),
        ))
    }
}

#[tokio::test]
async fn first_sending_part_asks_the_chosen_server_and_its_selection_reaches_the_client() {
    let mut pool = Pool::new(1, |_| {});
    let (sender, mut asked) = mpsc::unbounded_channel();
    let address = SocketAddr::new(pool.server_address(0), 7070);
    let serving = tonic::transport::Server::builder()
        .add_service(SelectionServer::new(LastPort(sender)))
        .serve(address);
    tokio::spawn(serving);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports == 4).await;
    let session = pool.request().await.unwrap();
    let request = asked.recv().await.unwrap();
    assert_eq!(
        request.session_id, session.id,
        "the request to select came first"
    );
    assert_eq!(
        session.port,
        20_000 + COUNT - 1,
        "the server's choice is the client's answer"
    );
    let local = session.address.parse().ok();
    assert_eq!(
        local,
        Some(pool.connection_address(0)),
        "the connection server's network address"
    );
}

#[tokio::test]
async fn connection_part_connects_the_selected_port_with_the_destination() {
    let pool = Pool::running(2, |_| {}).await;
    let session = pool.request().await.unwrap();
    assert_eq!(session.state, SessionState::Held);
    let mut stream = connect(&session);
    echo(&mut stream, "TCP");
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
        .connect((session.address.as_str(), session.port))
        .unwrap();
    socket.send(b"UDP").unwrap();
    let mut answer = [0; 8];
    assert_eq!(socket.recv(&mut answer).unwrap(), 3);
    pool.until(|state| {
        state
            .servers
            .iter()
            .any(|server| server.server == session.server && server.ports[0].busy == 1)
    })
    .await;
}

#[tokio::test]
async fn processing_server_obtains_its_port_positions_from_the_connection_servers_storage() {
    let mut pool = Pool::new(1, |_| {});
    pool.start_agent(0);
    let admin = SocketAddr::new(pool.server_address(0), 7071);
    let (attached, _messages) = attach(&pool, {
        let mut table = pool.table.clone();
        table.generation = 7;
        table.rows[0].ranges[0].count = 2;
        table
    })
    .await;
    assert_eq!(attached.generation, 7, "the higher generation wins");
    let stored = Table::decode(&page(admin, "/v1/port-table").await).unwrap();
    assert_eq!((stored.generation, stored.connection_port_count()), (7, 2));
}

/// A connection server of our own, attached to the real agent of slot 0.
async fn attach(pool: &Pool, table: Table) -> (v1::Welcome, Attached) {
    let address = format!("http://{}:7070", pool.server_address(0));
    let deadline = tokio::time::Instant::now() + SOON;
    let mut client = loop {
        match SelectionClient::connect(address.clone()).await {
            Ok(client) => break client,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    let (sender, outgoing) = mpsc::channel(16);
    let hello = v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        pool_uid: table.pool_uid.clone(),
        connection_server: "ours".to_owned(),
        table: table.encode().unwrap(),
        sessions: Vec::new(),
        host_identity: String::new(),
        unavailable_ports: Vec::new(),
    };
    let message = Some(to_agent::Message::Hello(hello));
    sender.send(ToAgent { message }).await.unwrap();
    let mut incoming = client
        .attach(ReceiverStream::new(outgoing))
        .await
        .unwrap()
        .into_inner();
    let welcome = incoming.message().await.unwrap().unwrap().message;
    let Some(from_agent::Message::Welcome(welcome)) = welcome else {
        panic!("no welcome")
    };
    (welcome, Attached { sender, incoming })
}

struct Attached {
    sender: mpsc::Sender<ToAgent>,
    incoming: Streaming<FromAgent>,
}

#[tokio::test]
async fn processing_server_receives_the_request_and_sends_one_of_its_available_positions() {
    let mut pool = Pool::new(1, |_| {});
    pool.start_workload(0);
    pool.start_agent(0);
    let table = pool.table.clone();
    let (_, mut attached) = attach(&pool, table).await;
    let (mut selected, mut request_id) = (HashSet::new(), 0);
    let mut select = async |attached: &mut Attached| {
        request_id += 1;
        let session_id = format!("session-{request_id}");
        let select = v1::Select {
            request_id,
            session_id,
            ..v1::Select::default()
        };
        attached
            .sender
            .send(ToAgent {
                message: Some(to_agent::Message::Select(select)),
            })
            .await
            .unwrap();
    };
    while selected.len() < usize::from(COUNT) {
        select(&mut attached).await;
        loop {
            match attached.incoming.message().await.unwrap().unwrap().message {
                Some(from_agent::Message::Selected(v1::Selected {
                    session: Some(session),
                    ..
                })) => {
                    assert!(
                        selected.insert(session.connection_port),
                        "no position twice"
                    );
                    break;
                }
                // The workload may not listen yet.
                Some(from_agent::Message::Refused(_)) => break,
                _ => {}
            }
        }
    }
    assert_eq!(
        selected,
        (20_000..20_000 + u32::from(COUNT)).collect(),
        "all from its storage"
    );
}

#[tokio::test]
async fn information_processing_apparatus_asks_connects_and_gives_back() {
    let pool = Arc::new(Pool::running(2, |_| {}).await);
    let client = pool.client();
    let session = client.request(SessionRequest::default()).await.unwrap();
    let mut stream = connect(&session);
    echo(&mut stream, "hello");
    assert_eq!(client.get(&session.id).await.unwrap().port, session.port);
    client.release(&session.id).await.unwrap();
    assert!(client.get(&session.id).await.is_err());
    pool.until(|state| state.free_ports == 2 * u32::from(COUNT))
        .await;
}
