//! What a hypervisor may say on its machine protocol's socket, edited at random: replies are replies, events are events,
//! and what is neither is left out.

use super::read_lines;
use std::cell::Cell;
use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

const SAID: &[u8] = br#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}
{"return": {}}
{"event": "STOP", "data": {"a": [1, 2.5e300, "\u00e9"]}, "timestamp": {"seconds": 1}}
{"error": {"class": "GenericError", "desc": "no"}}
{"event": "MIGRATION", "data": {"status": "completed"}}
"#;

#[test]
fn lines_of_the_machine_protocol() {
    fuzz!(vec![SAID.to_vec()], |words, _| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(words).unwrap();
        theirs.shutdown(Shutdown::Both).unwrap();
        let ((reply_tx, replies), (event_tx, events)) = (channel(), channel());
        let woken = Cell::new(0);
        read_lines(ours, &reply_tx, &event_tx, &|| woken.set(woken.get() + 1));
        drop((reply_tx, event_tx));
        let (replies, events) = (replies.into_iter().count(), events.into_iter().count());
        // Once for each event, and once at the end.
        assert_eq!(woken.get(), events + 1);
        assert!(replies + events <= words.split(|&byte| byte == b'\n').count());
        if words == SAID {
            assert_eq!((replies, events), (3, 2));
        }
    });
}
