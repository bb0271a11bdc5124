//! The ports of a request and of a session: one or more of each, in the order
//! of the request. The only place that knows which ports answer which request.
//!
//! An element of a request is a [`Block`]: adjacent connection ports of one
//! entry. One agent gives all blocks of a request or none, so that they are on
//! one processing server.

use std::num::NonZeroU8;

use super::{PortFilter, SessionRequest};
use crate::pool::{MAX_PORT_NAME_LENGTH, PortProtocol};
use crate::table::ListenPort;

/// Most elements of `ports` in a request.
pub const MAX_BLOCKS: usize = 16;

/// Most ports that a request may ask for altogether: a media server's call with
/// audio and video to 16 peers. It bounds what one client can take at once, and
/// the work of an agent for one request.
pub const MAX_PORTS: u8 = 64;

/// A list that is never empty. One of a single element is not allocated, since
/// most sessions have one port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OneOrMore<T> {
    /// The first element.
    pub first: T,
    /// The others.
    pub rest: Box<[T]>,
}

impl<T> OneOrMore<T> {
    /// A list of `first` alone.
    #[must_use]
    pub fn one(first: T) -> Self {
        Self {
            first,
            rest: Box::default(),
        }
    }

    /// The elements of `all`; `None` if there are none.
    #[must_use]
    pub fn new(all: impl IntoIterator<Item = T>) -> Option<Self> {
        let mut all = all.into_iter();
        Some(Self {
            first: all.next()?,
            rest: all.collect(),
        })
    }

    /// All elements, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> + Clone {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// The list of what `change` makes of each element.
    pub fn map<U>(&self, mut change: impl FnMut(&T) -> U) -> OneOrMore<U> {
        OneOrMore {
            first: change(&self.first),
            rest: self.rest.iter().map(change).collect(),
        }
    }
}

/// Adjacent connection ports of one port entry, as a request asks for them.
///
/// They lead to adjacent server ports, or all to the same one if the entry is
/// `Shared`. The first connection port of an even number of ports is even, as
/// RTP and RTCP have it (RFC 3550, section 11).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// The entries that it may be of.
    pub filter: PortFilter,
    /// The number of ports: 1 to [`MAX_PORTS`].
    pub count: NonZeroU8,
}

impl Default for Block {
    /// One port of any entry.
    fn default() -> Self {
        Self::single(PortFilter::default())
    }
}

impl Block {
    /// One port that `filter` admits.
    #[must_use]
    pub fn single(filter: PortFilter) -> Self {
        Self {
            filter,
            count: NonZeroU8::MIN,
        }
    }

    /// The number of ports.
    #[must_use]
    pub fn ports(&self) -> u32 {
        self.count.get().into()
    }

    /// The lowest number from `first` on that the block may begin with.
    #[must_use]
    pub fn begins_at(&self, first: u32) -> u32 {
        if self.count.get().is_multiple_of(2) {
            first.next_multiple_of(2)
        } else {
            first
        }
    }
}

impl SessionRequest {
    /// The ports that it asks for: those of `ports`, else one.
    ///
    /// # Errors
    /// A message that names the field which is wrong, and what it must be.
    pub fn blocks(&self) -> Result<OneOrMore<Block>, String> {
        let Some(ports) = &self.ports else {
            return Ok(OneOrMore::one(Block::single(PortFilter {
                port_name: self.port_name.clone(),
                protocol: self.protocol,
            })));
        };
        if let Some(field) = self.single_port_field() {
            return Err(format!(
                "{field} cannot be given together with ports: move it into the elements of ports"
            ));
        }
        let found = ports.len();
        if !(1..=MAX_BLOCKS).contains(&found) {
            return Err(format!(
                "ports must have 1 to {MAX_BLOCKS} elements; it has {found}"
            ));
        }
        let blocks = ports.iter().enumerate().map(|(index, port)| {
            let length = port.port_name.as_ref().map(|name| name.chars().count());
            if let Some(length) = length.filter(|it| !(1..=MAX_PORT_NAME_LENGTH).contains(it)) {
                return Err(format!(
                    "ports[{index}].portName must have 1 to {MAX_PORT_NAME_LENGTH} characters; this one has {length}"
                ));
            }
            let count = u8::try_from(port.count).ok().filter(|it| *it <= MAX_PORTS);
            let count = count.and_then(NonZeroU8::new).ok_or_else(|| {
                let found = port.count;
                format!("ports[{index}].count must be 1 to {MAX_PORTS}; this one is {found}")
            })?;
            let filter = PortFilter {
                port_name: port.port_name.clone(),
                protocol: port.protocol,
            };
            Ok(Block { filter, count })
        });
        let blocks: Vec<Block> = blocks.collect::<Result<_, String>>()?;
        let blocks = OneOrMore::new(blocks).expect("the list was seen not to be empty");
        match blocks.ports() {
            all if all > MAX_PORTS.into() => Err(format!(
                "ports must ask for at most {MAX_PORTS} ports altogether; these are {all}"
            )),
            _ => Ok(blocks),
        }
    }

    /// The name of a field that asks for a single port, if there is one.
    fn single_port_field(&self) -> Option<&'static str> {
        let port_name = self.port_name.as_ref().map(|_| "portName");
        port_name.or(self.protocol.map(|_| "protocol"))
    }
}

impl OneOrMore<Block> {
    /// The filter of a request for one port; `None` when it asks for several.
    #[must_use]
    pub fn as_single(&self) -> Option<&PortFilter> {
        let is_single = self.rest.is_empty() && self.first.count == NonZeroU8::MIN;
        is_single.then_some(&self.first.filter)
    }

    /// The number of ports altogether.
    #[must_use]
    pub fn ports(&self) -> u32 {
        self.iter().map(Block::ports).sum()
    }

    /// Whether a request for these blocks could have been given `ports`.
    #[must_use]
    pub fn could_be(&self, ports: &OneOrMore<SessionPort>) -> bool {
        let mut ports = ports.iter();
        let mut is_filled = |block: &Block| {
            let Some(first) = ports.next() else {
                return false;
            };
            let number = u32::from(first.port.get());
            let is_next = |(port, offset): (&SessionPort, u32)| {
                port.has_entry_of(first) && u32::from(port.port.get()) == number + offset
            };
            block.filter.admits(&first.port_name, first.protocol)
                && block.begins_at(number) == number
                && (1..block.ports())
                    .all(|offset| ports.next().is_some_and(|port| is_next((port, offset))))
        };
        self.iter().all(&mut is_filled) && ports.next().is_none()
    }

    /// Has `take` give each block ports of one of `entries`, all or none, and
    /// returns what it gave in the order of the blocks.
    ///
    /// `take` gets the index of an entry and a block. It is called for even
    /// blocks first, which are harder to align, longer ones before shorter ones,
    /// and then those that fewer entries serve. Of the entries that serve a block,
    /// those that the fewest blocks can use come first, then those of lower index.
    pub fn place<T>(
        &self,
        entries: &[(&str, PortProtocol)],
        mut take: impl FnMut(usize, &Block) -> Option<T>,
    ) -> Option<Vec<T>> {
        let serves = |block: &Block, (name, protocol)| block.filter.admits(name, protocol);
        let users = |entry| self.iter().filter(|block| serves(block, entry)).count();
        let choices = |block: &Block| {
            let entries = entries.iter().enumerate();
            let serving = entries.filter(|(_, entry)| serves(block, **entry));
            let mut serving: Vec<(usize, usize)> = serving
                .map(|(index, entry)| (users(*entry), index))
                .collect();
            serving.sort_unstable();
            serving
        };
        let mut blocks: Vec<_> = self
            .iter()
            .enumerate()
            .map(|(index, block)| (index, block, choices(block)))
            .collect();
        blocks.sort_by_key(|(_, block, choices)| {
            let is_odd = block.count.get() % 2 == 1;
            (is_odd, std::cmp::Reverse(block.count), choices.len())
        });
        let mut placed = Vec::with_capacity(blocks.len());
        for (index, block, choices) in blocks {
            let mut choices = choices.into_iter();
            let taken = choices.find_map(|(_, entry)| take(entry, block))?;
            placed.push((index, taken));
        }
        placed.sort_by_key(|(index, _)| *index);
        Some(placed.into_iter().map(|(_, taken)| taken).collect())
    }
}

/// A connection port of a session, with its entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionPort {
    /// The connection port.
    pub port: ListenPort,
    /// The name of its entry in the pool.
    pub port_name: String,
    /// What it forwards.
    pub protocol: PortProtocol,
}

impl SessionPort {
    /// A TCP port of the entry `name`, for tests.
    #[cfg(test)]
    pub(crate) fn example(name: &str, port: u16) -> Self {
        Self {
            port: ListenPort::new(port).unwrap(),
            port_name: name.to_owned(),
            protocol: PortProtocol::TCP,
        }
    }

    /// Whether both are of one entry.
    fn has_entry_of(&self, other: &Self) -> bool {
        self.port_name == other.port_name && self.protocol == other.protocol
    }
}

#[cfg(test)]
impl OneOrMore<Block> {
    /// Blocks of ports of these entries, or of any if the name is empty, for tests.
    pub(crate) fn example(blocks: &[(&str, u8)]) -> Self {
        let blocks = blocks.iter().map(|(name, count)| Block {
            filter: PortFilter {
                port_name: Some((*name).to_owned()).filter(|name| !name.is_empty()),
                protocol: None,
            },
            count: (*count).try_into().unwrap(),
        });
        Self::new(blocks).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, count: u8) -> Block {
        Block {
            filter: PortFilter {
                port_name: Some(name.to_owned()).filter(|name| !name.is_empty()),
                protocol: None,
            },
            count: NonZeroU8::new(count).unwrap(),
        }
    }

    fn ports(ports: &[(&str, u16)]) -> OneOrMore<SessionPort> {
        let port = |(name, number): &(&str, u16)| SessionPort::example(name, *number);
        OneOrMore::new(ports.iter().map(port)).unwrap()
    }

    fn blocks(blocks: &[(&str, u8)]) -> OneOrMore<Block> {
        OneOrMore::new(blocks.iter().map(|(name, count)| block(name, *count))).unwrap()
    }

    #[test]
    fn a_request_could_have_been_given_what_fits_it_in_order() {
        let given = ports(&[("rtp", 20_000), ("rtp", 20_001), ("control", 20_100)]);
        for (wanted, expected) in [
            (&[("rtp", 2), ("control", 1)][..], true),
            (&[("", 2), ("", 1)], true),
            (&[("rtp", 1), ("rtp", 1), ("control", 1)], true),
            (&[("control", 1), ("rtp", 2)], false),
            (&[("rtp", 2)], false),
            (&[("rtp", 2), ("control", 2)], false),
            (&[("", 3)], false),
            (&[("rtp", 2), ("control", 1), ("", 1)], false),
        ] {
            assert_eq!(blocks(wanted).could_be(&given), expected, "{wanted:?}");
        }
        let odd = ports(&[("rtp", 20_001), ("rtp", 20_002)]);
        assert!(!blocks(&[("rtp", 2)]).could_be(&odd));
        let apart = ports(&[("rtp", 20_000), ("rtp", 20_002)]);
        assert!(!blocks(&[("rtp", 2)]).could_be(&apart));
    }

    #[test]
    fn elements_of_ports_are_objects() {
        let parse = |text: &str| serde_json::from_str::<SessionRequest>(text);
        let request = parse(r#"{"ports": [{"portName": "rtp", "count": 2}, {}]}"#).unwrap();
        let wanted = request.blocks().unwrap();
        assert_eq!(wanted, blocks(&[("rtp", 2), ("", 1)]));
        for wrong in [r#"[["rtp"]]"#, "[null]", "[1]", r#"[{"name": "rtp"}]"#] {
            parse(&format!(r#"{{"ports": {wrong}}}"#)).unwrap_err();
        }
    }

    #[test]
    fn an_entry_is_left_to_those_that_can_use_no_other() {
        use PortProtocol::{TCP, TCPUDP, UDP};
        let speaking = |protocol| {
            Block::single(PortFilter {
                port_name: None,
                protocol: Some(protocol),
            })
        };
        let wanted = OneOrMore::new([TCP, UDP, TCP].map(speaking)).unwrap();
        let entries = [("both", TCPUDP), ("stream", TCP), ("datagram", UDP)];
        let mut free = [1, 1, 1];
        let placed = wanted.place(&entries, |entry, block| {
            free[entry] = u32::checked_sub(free[entry], block.ports())?;
            Some(entries[entry].0)
        });
        assert_eq!(placed, Some(vec!["stream", "datagram", "both"]));
        let wanted = blocks(&[("", 1), ("a", 1)]);
        let mut free = [1, 1];
        let placed = wanted.place(&[("a", TCP), ("b", TCP)], |entry, block| {
            free[entry] = u32::checked_sub(free[entry], block.ports())?;
            Some(entry)
        });
        assert_eq!(placed, Some(vec![1, 0]));
    }
}
