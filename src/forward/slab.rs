//! Dense storage whose keys distinguish a reused place from its former content.
//!
//! It is written by hand because a key must fit the 56 bits that epoll's data
//! has beside the kind of event source; a key of the crate `slotmap` has 64.

/// Items by index and generation.
#[derive(Debug)]
pub(super) struct Slab<T> {
    entries: Vec<(u32, Option<T>)>,
    vacant: Vec<u32>,
}

/// The name of an item. It finds nothing once the item is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) index: u32,
    /// The number of items that the place had before; 24 bits.
    pub(super) generation: u32,
}

impl Key {
    const GENERATION: u32 = 0xff_ffff;

    pub(super) fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub(super) fn from_bits(bits: u64) -> Self {
        let index = u32::try_from(bits & u64::from(u32::MAX)).expect("32 bits were kept");
        let generation =
            u32::try_from(bits >> 32 & u64::from(Self::GENERATION)).expect("24 bits were kept");
        Self { index, generation }
    }
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            vacant: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    pub(super) fn insert(&mut self, item: T) -> Key {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push((0, None));
            u32::try_from(self.entries.len() - 1).expect("descriptors run out far below 2^32")
        });
        let entry = &mut self.entries[index as usize];
        entry.1 = Some(item);
        Key {
            index,
            generation: entry.0,
        }
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let entry = self.entries.get_mut(key.index as usize)?;
        entry.1.as_mut().filter(|_| entry.0 == key.generation)
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        let entry = self.entries.get_mut(key.index as usize)?;
        let item = entry.1.take_if(|_| entry.0 == key.generation)?;
        entry.0 = (entry.0 + 1) & Key::GENERATION;
        self.vacant.push(key.index);
        Some(item)
    }

    /// Removes all items and returns them.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> {
        let keys: Vec<Key> = self.iter().map(|(key, _)| key).collect();
        keys.into_iter().filter_map(|key| self.remove(key))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.vacant.len()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries
            .iter_mut()
            .filter_map(|(_, item)| item.as_mut())
    }

    /// The number of places, vacant ones included.
    pub(super) fn places(&self) -> usize {
        self.entries.len()
    }

    /// The item at a place, with its key.
    pub(super) fn at(&self, place: usize) -> Option<(Key, &T)> {
        let (generation, item) = self.entries.get(place)?;
        let key = Key {
            index: u32::try_from(place).ok()?,
            generation: *generation,
        };
        Some((key, item.as_ref()?))
    }

    /// The items with their keys.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        let keyed = self.entries.iter().zip(0u32..);
        keyed.filter_map(|((generation, item), index)| {
            Some((
                Key {
                    index,
                    generation: *generation,
                },
                item.as_ref()?,
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_a_removed_item_finds_nothing() {
        let mut slab = Slab::default();
        let first = slab.insert("first");
        assert_eq!(slab.remove(first), Some("first"));
        let second = slab.insert("second");
        assert_eq!(first.index, second.index, "the place is used again");
        assert_eq!(slab.get_mut(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get_mut(second), Some(&mut "second"));
        assert_eq!(slab.len(), 1);
        assert_eq!(Key::from_bits(second.to_bits()), second);
    }
}
