//! Manifests as users write them, right and wrong.

mod odd;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::Path;

use jiff::Timestamp;
use kube::ResourceExt;
use kube_cel::Validator;
use portpool::manifest;
use portpool::plan::{Observed, environment, plan};
use portpool::pool::{
    Admission, ClientBinding, ConnectionPorts, EntryAdmission, Exposure, Mapping, Offer, PortEntry,
    PortProtocol, ProcessingPool, ProcessingPoolSpec, ProxyProtocol, Replies, rules,
};
use proptest::prelude::*;

const GOOD: &str = "\
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {name: small}
spec:
  ports:
    - {name: main, port: 7000, count: 2}
  template:
    spec:
      containers: [{name: echo, command: [portpool, echo]}]
";

#[test]
fn a_minimal_manifest_has_at_most_ten_lines_and_sane_defaults() {
    assert!(GOOD.lines().count() <= 10);
    let pool = manifest::parse(GOOD).unwrap();
    assert_eq!((pool.replicas, pool.load_sharing_port), (2, 7700));
    assert_eq!(pool.connection_ports, 20_000..=29_999);
    assert_eq!(pool.sessions.claim_seconds, 30);
}

#[test]
fn the_readmes_pool_is_valid_and_short() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"));
    let readme = readme.unwrap();
    let (_, rest) = readme.split_once("```yaml\n").unwrap();
    let (pool, _) = rest.split_once("```").unwrap();
    assert!(pool.lines().count() <= 10);
    assert_eq!(manifest::parse(pool).unwrap().name, "small");
}

#[test]
fn every_example_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut found = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            manifest::load(&path).unwrap_or_else(|error| panic!("{error}"));
            found += 1;
        }
    }
    assert_eq!(found, 13);
}

/// The names of portpool's variables that `text` uses without a default: `$NAME`,
/// `$(NAME)` or `${NAME}`, but not those of `${NAME:+…}` and `${NAME:?…}`.
fn needed_variables(text: &str) -> BTreeSet<String> {
    let is_of_name = |letter: char| letter.is_ascii_uppercase() || "_0123456789".contains(letter);
    let (mut needed, mut rest) = (BTreeSet::new(), text);
    while let Some((_, after)) = rest.split_once('$') {
        rest = after;
        let inner = after.trim_start_matches(['{', '(']);
        let end = inner.find(|letter| !is_of_name(letter));
        let (name, end) = inner.split_at(end.unwrap_or(inner.len()));
        if name.starts_with("PORTPOOL_") {
            if after.starts_with('{') && end.starts_with(':') {
                rest = end.split_once('}').unwrap().1;
            } else {
                needed.insert(name.to_owned());
            }
        }
    }
    needed
}

#[test]
fn examples_need_only_variables_that_every_pool_has() {
    let text = "$PORTPOOL_A ${PORTPOOL_B} $(PORTPOOL_C) ${PORTPOOL_D:+x=$PORTPOOL_D} $POD_IP $!";
    let expected = ["PORTPOOL_A", "PORTPOOL_B", "PORTPOOL_C"];
    assert!(needed_variables(text).iter().eq(expected));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut checked = 0;
    for example in std::fs::read_dir(folder).unwrap() {
        let path = example.unwrap().path();
        let pool = manifest::load(&path).unwrap().pool;
        let needed = needed_variables(&pool.raw_template.0.to_string());
        checked += needed.len();
        let planned = plan(&pool, &Observed::nothing("uid"), Timestamp::UNIX_EPOCH);
        for row in planned.table.rows {
            // In a cluster, no address is known unless the manifest has one.
            let address = pool.advertised_address.as_deref();
            let given = environment(&pool, &row, address, Ipv4Addr::LOCALHOST.into());
            for name in &needed {
                let is_given = given.iter().any(|(given, _)| given == name);
                assert!(is_given, "{}: {name} may be missing", path.display());
            }
        }
    }
    assert!(checked >= 5);
}

#[test]
fn the_page_about_programs_has_valid_entries_and_all_examples() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/programs.md")).unwrap();
    let fragments = page.split("```yaml\n").skip(1);
    let fragments: Vec<&str> = fragments
        .map(|rest| rest.split_once("```").unwrap().0)
        .collect();
    assert_eq!(fragments.len(), 7);
    for fragment in fragments {
        let (head, template) = GOOD.split_once("  ports:").unwrap();
        let (_, template) = template.split_once("  template:").unwrap();
        let indented: String = fragment.lines().map(|line| format!("  {line}\n")).collect();
        let pool = format!("{head}{indented}  template:{template}");
        if let Err(problems) = manifest::parse(&pool) {
            panic!("{problems:?} in\n{pool}");
        }
    }
    for example in std::fs::read_dir(root.join("examples")).unwrap() {
        let name = example.unwrap().file_name().into_string().unwrap();
        assert!(page.contains(&format!("`{name}`")), "{name} has no row");
    }
}

#[test]
fn wrong_manifests_are_located_and_explained() {
    // A text, its replacement, and the line, column and words of the message.
    let cases = [
        (
            "kind: ProcessingPool",
            "kind: Pool",
            2,
            1,
            "must be ProcessingPool",
        ),
        ("v1alpha1", "v1", 1, 1, "must be portpool.dev/v1alpha1"),
        ("{name: small}", "{}", 3, 1, "name is missing"),
        ("name: small", "name: Small_X", 3, 12, "lower-case letters"),
        (
            "name: small",
            "name: small-",
            3,
            12,
            "not end with a hyphen",
        ),
        (
            "metadata: {name: small}",
            "metadata: {name: small}\nkind: Pool",
            4,
            1,
            "duplicate mapping key: kind",
        ),
        (
            "spec:\n",
            "---\nspec:\n",
            5,
            1,
            "a second document begins here: give one",
        ),
        (
            "  ports:",
            "  prots:",
            5,
            3,
            "did you mean ports? allowed: connectionServer, ",
        ),
        ("count: 2", "cuont: 2", 6, 32, "did you mean count?"),
        (
            "count: 2",
            "count: two",
            6,
            32,
            "must be a whole number, not text",
        ),
        (
            "count: 2",
            "count: 0",
            6,
            32,
            "must be 1 to 10000; this is 0",
        ),
        (
            "count: 2",
            "count: 2, protocol: tcp",
            6,
            42,
            "allowed: TCP, UDP, TCPUDP",
        ),
        ("name: main", "name: Main", 6, 8, "does not match"),
        ("name: main, ", "", 6, 7, "name is missing"),
        (
            "port: 7000",
            "port: 65535",
            6,
            33,
            "port + count - 1 is 65536, above 65535",
        ),
        ("port: 7000", "port: 7069", 6, 20, "portpool's agent"),
        ("command", "comand", 9, 33, "did you mean command?"),
        (
            "spec:\n  ports",
            "spec:\n  replicas: 5001\n  ports",
            5,
            3,
            "must be 0 to 1000",
        ),
        (
            "spec:\n  ports",
            "spec:\n  connectionServer: {connectionPorts: {first: 9, last: 8}}\n  ports",
            5,
            40,
            "must not be above last (8)",
        ),
        (
            "spec:\n  ports",
            "spec:\n  connectionServer: {loadSharingPort: 20001}\n  ports",
            5,
            22,
            "outside connectionPorts",
        ),
        (
            "spec:\n  ports",
            "spec:\n  sessions: {admission: Closed}\n  ports",
            5,
            14,
            "allowed: Session, Open",
        ),
        (
            "spec:\n  ports",
            "spec:\n  sessions: {admission: Companion}\n  ports",
            5,
            14,
            "allowed: Session, Open",
        ),
        (
            "metadata: {name: small}",
            "metadata: {name: small",
            4,
            0,
            "",
        ),
    ];
    for (from, to, line, column, words) in cases {
        let text = GOOD.replacen(from, to, 1);
        let problems = manifest::parse(&text).expect_err(to);
        let hit = problems.iter().any(|found| {
            (found.line == line && (column == 0 || found.column == column) || words.is_empty())
                && found.message.contains(words)
        });
        assert!(
            hit,
            "{to:?}: expected {line}:{column} {words:?}, found {problems:?}"
        );
    }
}

#[test]
fn a_message_begins_with_file_line_and_column() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pool.yaml");
    std::fs::write(&path, GOOD.replace("count: 2", "count: 0")).unwrap();
    let message = manifest::load(&path).unwrap_err().to_string();
    assert!(
        message.starts_with(&format!("{}:6:32: spec.ports[0].count: ", path.display())),
        "{message}"
    );
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(
        manifest::load(&path)
            .unwrap_err()
            .to_string()
            .contains("not UTF-8")
    );
    assert!(
        manifest::load(folder.path().join("none").as_path())
            .unwrap_err()
            .to_string()
            .contains("cannot be read")
    );
}

#[test]
fn deep_nesting_and_alias_bombs_are_refused() {
    let deep = format!("{}x{}", "[".repeat(5000), "]".repeat(5000));
    assert!(manifest::parse(&deep).is_err());
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let reference = format!("*a{}", level - 1);
        let list = vec![reference; 9].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{list}]\n"));
    }
    assert!(manifest::parse(&bomb).is_err());
}

#[test]
fn every_field_of_the_crd_is_described() {
    fn walk(schema: &serde_json::Value, path: &str) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            let description = field["description"].as_str().unwrap_or_default();
            assert!(description.len() > 10, "{path} has no description");
            assert!(
                field.get("additionalProperties").is_none(),
                "{path} is not structural"
            );
            walk(field, &path);
            walk(&field["items"], &format!("{path}[]"));
        }
    }
    let crd = serde_json::to_value(manifest::crd()).unwrap();
    walk(
        &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"],
        "spec",
    );
}

/// The messages of the CRD's CEL rules that `spec` breaks.
fn broken_cel_rules(validator: &Validator, spec: &ProcessingPoolSpec) -> Vec<String> {
    let crd = serde_json::to_value(manifest::crd()).unwrap();
    let mut schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
    schema["properties"]["metadata"] = serde_json::json!({ "type": "object" });
    let pool = ProcessingPool::new("small", spec.clone());
    let object = serde_json::to_value(&pool).unwrap();
    let errors = validator.validate(&schema, &object, None).err();
    let errors = errors
        .into_iter()
        .flat_map(kube_cel::ValidationErrors::into_vec);
    errors.map(|error| error.message).collect()
}

fn small_pool() -> ProcessingPoolSpec {
    serde_json::from_value(serde_json::json!({
        "ports": [{ "name": "a", "port": 7000, "count": 2 }, { "name": "b", "port": 8000 }],
        "template": {},
    }))
    .unwrap()
}

/// Pools that are unusual and work: a port that everyone may use is its requester's
/// while it has a session, and open ports beside companion ports have sessions too.
const WORKING: [fn(&mut ProcessingPoolSpec); 2] = [
    |spec| {
        spec.sessions.admission = Admission::Open;
        spec.sessions.client_binding = ClientBinding::Requester;
    },
    |spec| {
        spec.sessions.admission = Admission::Open;
        spec.ports[0].admission = Some(EntryAdmission::Companion);
    },
];

#[test]
fn every_rule_is_the_same_in_cel_and_in_code() {
    type Change = fn(&mut ProcessingPoolSpec);
    // A change that breaks a rule, where, and words of the API server's message and of
    // ours, which also has the remedy.
    let cases: [(Change, &str, &str, &str); 20] = [
        (
            |spec| spec.connection_server.connection_ports.last = 20_004,
            "spec.connectionServer.connectionPorts",
            "widen the range",
            "widen connectionPorts, or lower replicas",
        ),
        (
            |spec| {
                spec.replicas = 1000;
                spec.ports = (0..7).map(|index| entry(index, 9000 + index, 1)).collect();
            },
            "spec.ports",
            "fits into a ConfigMap",
            "lower replicas or merge entries",
        ),
        (
            |spec| spec.ports[1].port = Some(7001),
            "spec.ports[1].port",
            "overlap",
            "move one of them",
        ),
        (
            |spec| spec.connection_server.load_sharing_port = 20_000,
            "spec.connectionServer.loadSharingPort",
            "outside connectionPorts",
            "outside connectionPorts, 20000 to",
        ),
        (
            |spec| {
                spec.connection_server.exposure = Exposure::HostNetwork;
                spec.connection_server.load_sharing_port = 80;
            },
            "spec.connectionServer.loadSharingPort",
            "no privilege on a node",
            "choose higher ports, or another exposure",
        ),
        (
            |spec| {
                spec.connection_server.exposure = Exposure::HostNetwork;
                spec.connection_server.connection_ports.first = 1023;
                spec.connection_server.connection_ports.last = 1100;
            },
            "spec.connectionServer.connectionPorts.first",
            "must not be below 1024",
            "this is 1023",
        ),
        (
            |spec| spec.connection_server.load_sharing_port = 7701,
            "spec.connectionServer.loadSharingPort",
            "7701",
            "must not include 7701",
        ),
        (
            |spec| {
                spec.connection_server.connection_ports = ConnectionPorts {
                    first: 7701,
                    last: 8000,
                };
            },
            "spec.connectionServer.connectionPorts",
            "7701",
            "must not include 7701",
        ),
        (
            |spec| spec.connection_server.connection_ports.last = 9,
            "spec.connectionServer.connectionPorts.first",
            "must not be above last",
            "above last (9); this is",
        ),
        (
            |spec| spec.ports[0].port = Some(65_535),
            "spec.ports[0].count",
            "must not exceed 65535",
            "above 65535: lower one of them",
        ),
        (
            |spec| {
                spec.ports[0].proxy_protocol = ProxyProtocol::V2;
                spec.ports[0].protocol = PortProtocol::TCPUDP;
            },
            "spec.ports[0].proxyProtocol",
            "needs protocol TCP",
            "set protocol: TCP, or remove proxyProtocol",
        ),
        (
            |spec| {
                spec.ports[0].replies = Replies::AnyPort;
                spec.ports[0].protocol = PortProtocol::TCP;
            },
            "spec.ports[0].replies",
            "needs protocol UDP or TCPUDP",
            "set protocol: UDP, or remove replies",
        ),
        (
            |spec| spec.ports[0].port = Some(7069),
            "spec.ports[0].port",
            "belong to portpool's agent",
            "move the workload's ports",
        ),
        (
            |spec| spec.ports[0].port = None,
            "spec.ports[0].port",
            "port is required",
            "give the first port that the workload listens on",
        ),
        (
            |spec| spec.ports[1].mapping = Mapping::Identity,
            "spec.ports[1].port",
            "must be absent with mapping Identity",
            "remove it, or choose another mapping",
        ),
        (
            |spec| {
                (spec.ports[1].port, spec.ports[1].mapping) = (None, Mapping::Identity);
                spec.ports[0].port = Some(20_000);
            },
            "spec.ports[1].mapping",
            "overlap",
            "an entry may have any of connectionPorts",
        ),
        (
            |spec| {
                (spec.ports[1].port, spec.ports[1].mapping) = (None, Mapping::Identity);
                spec.ports[0].port = Some(100);
                spec.connection_server.connection_ports = ConnectionPorts {
                    first: 7073,
                    last: 7200,
                };
            },
            "spec.connectionServer.connectionPorts",
            "must not include 7070 to 7073",
            "choose another range",
        ),
        (
            |spec| spec.ports[0].offer = Offer::WhenAnyListens,
            "spec.ports[0].offer",
            "needs protocol TCPUDP",
            "set protocol: TCPUDP, or remove offer",
        ),
        (
            |spec| {
                spec.ports[0].admission = Some(EntryAdmission::Companion);
                spec.ports[0].offer = Offer::Always;
            },
            "spec.ports[0].offer",
            "does not apply with admission Companion",
            "remove offer",
        ),
        (
            |spec| {
                for entry in &mut spec.ports {
                    entry.admission = Some(EntryAdmission::Companion);
                }
            },
            "spec.ports",
            "another admission than Companion",
            "add an entry for the port that clients ask for",
        ),
    ];
    let validator = Validator::new();
    assert_eq!(rules::check(&small_pool()), []);
    assert_eq!(broken_cel_rules(&validator, &small_pool()), [""; 0]);
    for change in WORKING {
        let mut spec = small_pool();
        change(&mut spec);
        assert_eq!(rules::check(&spec), []);
        assert_eq!(broken_cel_rules(&validator, &spec), [""; 0]);
    }
    for (change, path, words, ours) in cases {
        let mut spec = small_pool();
        change(&mut spec);
        let (here, cel) = (rules::check(&spec), broken_cel_rules(&validator, &spec));
        let [problem] = here.as_slice() else {
            panic!("{path}: {here:?}");
        };
        assert_eq!(problem.path, path);
        assert!(problem.message.contains(ours), "{problem:?}");
        assert!(cel.iter().any(|message| message.contains(words)), "{cel:?}");
    }
}

#[test]
fn an_address_that_clients_cannot_use_is_refused_in_cel_and_in_code() {
    let validator = Validator::new();
    let cases = [
        (
            true,
            "192.0.2.1 127.0.0.2 169.254.1.1 10.0.0.0 ::1 2001:db8::1 fe80::1 fd00:0:0::7",
        ),
        (
            true,
            "localhost game.example.org a_b.example xn--bcher-kva.example 3com 1.example 10.0.0.x",
        ),
        (
            false,
            "0.0.0.0 255.255.255.255 224.0.0.1 :: 0:0::0 ff02::1 ::ffff:192.0.2.1 fe80::1%eth0",
        ),
        (
            false,
            "game.example.org:443 192.0.2.1:80 [::1] [::1]:80 ... . .a a. a..b -a a- a.-b *.a",
        ),
        (false, "1.2.3 1.2.3.4.5 256.1.1.1 01.2.3.4 7 a/b a,b"),
    ];
    for (is_good, addresses) in cases {
        let labels = [63, 64].map(|length| format!("{}.example", "a".repeat(length)));
        let long = labels[usize::from(!is_good)].as_str();
        for address in addresses.split(' ').chain([long]) {
            let mut spec = small_pool();
            spec.connection_server.advertised_address = Some(address.to_owned());
            let (here, cel) = (rules::check(&spec), broken_cel_rules(&validator, &spec));
            assert_eq!(here.is_empty(), is_good, "{address}: {here:?}");
            assert_eq!(cel.is_empty(), is_good, "{address}: {cel:?}");
        }
    }
}

fn entry(index: i32, port: i32, count: i32) -> PortEntry {
    PortEntry {
        name: format!("e{index}"),
        port: Some(port),
        count,
        protocol: PortProtocol::TCP,
        mapping: Mapping::Offset,
        offer: Offer::WhenListening,
        admission: None,
        proxy_protocol: ProxyProtocol::None,
        replies: Replies::ServerPort,
    }
}

/// Port entries near the edges of the rules.
fn near_entry() -> impl Strategy<Value = PortEntry> {
    let port = prop_oneof![1..=65_535, 7060..=7075, 65_500..=65_535];
    let count = prop_oneof![1..=12, 1..=10_000];
    let protocol = prop_oneof![
        Just(PortProtocol::TCP),
        Just(PortProtocol::UDP),
        Just(PortProtocol::TCPUDP)
    ];
    let mapping = prop_oneof![
        Just(Mapping::Offset),
        Just(Mapping::Shared),
        Just(Mapping::Identity)
    ];
    let offer = prop_oneof![
        3 => Just(Offer::WhenListening),
        1 => Just(Offer::WhenAnyListens),
        1 => Just(Offer::Always)
    ];
    let admission = prop_oneof![
        3 => Just(None),
        1 => Just(Some(EntryAdmission::Session)),
        1 => Just(Some(EntryAdmission::Open)),
        2 => Just(Some(EntryAdmission::Companion))
    ];
    let without_port = prop_oneof![9 => Just(false), 1 => Just(true)];
    let replies = prop_oneof![2 => Just(Replies::ServerPort), 1 => Just(Replies::AnyPort)];
    let proxy_protocol = prop_oneof![4 => Just(ProxyProtocol::None), 1 => Just(ProxyProtocol::V2)];
    (
        port,
        count,
        protocol,
        mapping,
        (offer, admission),
        proxy_protocol,
        replies,
        without_port,
    )
        .prop_map(
            |(
                port,
                count,
                protocol,
                mapping,
                (offer, admission),
                proxy_protocol,
                replies,
                without_port,
            )| {
                PortEntry {
                    protocol,
                    mapping,
                    offer,
                    admission,
                    proxy_protocol,
                    replies,
                    port: (without_port != (mapping != Mapping::Identity)).then_some(port),
                    ..entry(0, port, count)
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn cel_and_code_agree_on_every_pool(
        replicas in prop_oneof![0..=5, 0..=1000],
        entries in proptest::collection::vec(near_entry(), 1..4),
        load_sharing_port in prop_oneof![7690..=7710, 1..=65_535],
        first in prop_oneof![7690..=7710, 1..=65_535],
        length in prop_oneof![-2..=30, 1000..=30_000],
        on_host in any::<bool>(),
    ) {
        let mut spec = small_pool();
        if on_host {
            spec.connection_server.exposure = Exposure::HostNetwork;
        }
        spec.replicas = replicas;
        spec.ports = entries;
        for (index, entry) in spec.ports.iter_mut().enumerate() {
            entry.name = format!("e{index}");
        }
        spec.connection_server.load_sharing_port = load_sharing_port;
        let last = i32::clamp(first + length, 1, 65_535);
        spec.connection_server.connection_ports = ConnectionPorts { first, last };
        let (here, cel) = (rules::check(&spec), broken_cel_rules(&Validator::new(), &spec));
        prop_assert_eq!(here.is_empty(), cel.is_empty(), "{:?} {:?}", here, cel);
    }

    #[test]
    fn names_are_the_same_in_cel_and_in_code(name in "[a-zA-Z0-9-]{0,4}|[a-c-]{50,54}") {
        let crd = serde_json::to_value(manifest::crd()).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let pool = ProcessingPool::new(&name, small_pool());
        prop_assert_eq!(pool.name_any(), name.clone());
        let mut schema = schema.clone();
        schema["properties"]["metadata"] =
            serde_json::json!({ "type": "object", "properties": { "name": { "type": "string" } } });
        let object = serde_json::to_value(&pool).unwrap();
        let is_good = Validator::new().validate(&schema, &object, None).is_ok();
        prop_assert_eq!(is_good, rules::check_name(&name).is_empty());
    }
}

proptest! {
    #[test]
    fn no_manifest_panics(at in 0usize..300, junk in "[\\PC\n ]{0,12}", length in 0usize..30) {
        let start = (0..=at.min(GOOD.len())).rev().find(|at| GOOD.is_char_boundary(*at)).unwrap();
        let end = (start + length).min(GOOD.len());
        let text = format!("{}{junk}{}", &GOOD[..start], &GOOD[end..]);
        let _ = manifest::parse(&text);
    }
}
