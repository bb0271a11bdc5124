use super::*;
use crate::session::Amendment;

#[test]
fn an_agent_is_asked_once_it_has_said_that_it_amends() {
    let (sessions, outbox, mut sent) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    let amend = |id: &str| sessions.amend(&id_of(id), Amendment::default());
    let refusal = |id: &str| amend(id).map(drop);
    assert_eq!(refusal("none"), Err(AmendError::Unknown));
    assert_eq!(refusal("a"), Err(AmendError::OutOfReach), "no welcome yet");
    sessions.amends(Slot(0), false);
    assert_eq!(refusal("a"), Err(AmendError::TooOld));
    assert_eq!(next(&mut sent), None);
    sessions.amends(Slot(0), true);
    let answer = amend("a").expect("it is asked");
    assert!(matches!(next(&mut sent), Some(ToAgent::Amend { .. })));
    drop(answer);
    // Its successor may be another version.
    sessions.attach(Slot(0), outbox.clone(), |_| ToAgent::Goodbye);
    assert_eq!(refusal("a"), Err(AmendError::OutOfReach));
    sessions.amends(Slot(0), true);
    sessions.detach(Slot(0), &outbox);
    assert_eq!(refusal("a"), Err(AmendError::OutOfReach));
}
