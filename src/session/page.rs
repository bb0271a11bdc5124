//! Pages of lists that are in the order of ids.

/// The number of elements of a page: `limit`, or `default` where a request names none.
/// `None` if it is not 1 to `most`.
#[must_use]
pub fn page_length(limit: Option<usize>, default: usize, most: usize) -> Option<usize> {
    let limit = limit.unwrap_or(default);
    (1..=most).contains(&limit).then_some(limit)
}

/// The first `length` of `found` by `id`, and the last id of them if there are more.
pub fn first_page<T>(
    mut found: Vec<T>,
    length: usize,
    id: impl Fn(&T) -> &str,
) -> (Vec<T>, Option<String>) {
    found.sort_unstable_by(|one, other| id(one).cmp(id(other)));
    let has_more = found.len() > length;
    found.truncate(length);
    let next = found.last().filter(|_| has_more);
    let next = next.map(|last| id(last).to_owned());
    (found, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_the_first_ones_and_says_where_the_next_begins() {
        let all = || vec!["c", "a", "b"];
        for (length, page, next) in [
            (1, vec!["a"], Some("a")),
            (2, vec!["a", "b"], Some("b")),
            (3, vec!["a", "b", "c"], None),
            (4, vec!["a", "b", "c"], None),
        ] {
            let found = first_page(all(), length, |id| id);
            assert_eq!(found, (page, next.map(str::to_owned)));
        }
    }

    #[test]
    fn the_length_of_a_page_has_bounds() {
        let length = |limit| page_length(limit, 20, 100);
        assert_eq!(length(None), Some(20));
        assert_eq!((length(Some(1)), length(Some(100))), (Some(1), Some(100)));
        assert_eq!((length(Some(0)), length(Some(101))), (None, None));
    }
}
