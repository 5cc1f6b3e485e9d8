//! The daemon's side of the tree, as it comes over the control socket.

use super::{Asker, For};
use crate::control::{AskAnswer, Reply, TreeRequest};
use crate::core::Core;
use crate::front::workers;
use rustix::io::Errno;
use serde_json::{Value, json};
use std::time::Duration;

/// The longest that one question for the next request may wait.
const NEXT_MAX: Duration = Duration::from_secs(5);

impl Core {
    /// Answers a request about the tree.
    pub(crate) fn serve_tree(&self, request: TreeRequest) -> Reply<Value> {
        let tree = &self.tree;
        let ok = |value: Value| Reply::Ok(value);
        fn written<T: serde::Serialize>(done: std::io::Result<T>) -> Reply<Value> {
            match done {
                Ok(value) => Reply::Ok(json!(value)),
                Err(e) => Reply::Error(format!("the mirrored files cannot be written down: {e}")),
            }
        }
        match request {
            TreeRequest::Next { known, wait_ms } => {
                ok(json!(tree.desk.next(&known, Duration::from_millis(wait_ms).min(NEXT_MAX))))
            }
            TreeRequest::Answer { token, answer } => {
                let asker = tree.desk.take(&token);
                if let Some(asker) = asker {
                    self.tell(asker, &answer);
                }
                ok(json!(asker.is_some()))
            }
            TreeRequest::SetFiles { files } => written(tree.set_files(files)),
            TreeRequest::Opens => ok(json!(tree.opens())),
            TreeRequest::Bar { blob, number } => ok(json!(tree.bar(&blob, number))),
            TreeRequest::Lift { bar } => {
                tree.lift(bar);
                ok(Value::Null)
            }
            TreeRequest::Retire { overlay, changed } => {
                let of_no_use = || changed || self.objects.changed_bytes(overlay).is_none_or(|bytes| bytes == 0);
                written(tree.retire(overlay, of_no_use))
            }
            TreeRequest::Changed { overlay } => ok(json!(self.objects.changed_bytes(overlay).unwrap_or(0))),
        }
    }

    /// Tells the kernel what the daemon answered.
    fn tell(&self, asker: Asker, answer: &AskAnswer) {
        let answer = match (answer, asker.what) {
            (AskAnswer::Failed { errno, why }, _) => {
                log::warn!("request {:#x} of thread {} failed: {why}", asker.unique, asker.thread);
                crate::front::Answer::Error(Errno::from_raw_os_error(*errno))
            }
            (AskAnswer::Done(overlay), For::Open) => self.opened(asker.unique, *overlay),
            (AskAnswer::Done(number), For::Ioctl { room }) => crate::front::tree::ioctl_answer(*number, room),
        };
        // Small: what must be there when the kernel copies it was just written.
        workers::reply(self, asker.unique, answer, &mut [0; 256]);
    }

    /// Gives up what waits for a daemon that does not come, for ever.
    pub(crate) fn watch_desk(&self) {
        self.tree.desk.watch(crate::stats::is_dying, |asker, errno| {
            workers::reply(self, asker.unique, crate::front::Answer::Error(errno), &mut [0; 256]);
        });
    }
}
