//! Calls about the tree of blobs.

use super::{Answer, Client};
use crate::control::{Ask, AskAnswer, FilePlace, Opens, Request, TreeRequest};
use std::time::Duration;

impl Client {
    fn tree<T: serde::de::DeserializeOwned>(&mut self, request: TreeRequest) -> Answer<T> {
        self.call(&Request::Tree(request))
    }

    /// The next thing that only the daemon can do, other than `known`, on which it works and which it thereby says to
    /// tend. Waits for one, at most `wait`, which is to be shorter than a call's time limit, and than five seconds.
    ///
    /// # Errors
    /// As all calls.
    pub fn next_ask(&mut self, known: &[String], wait: Duration) -> Answer<Option<Ask>> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.tree(TreeRequest::Next { known: known.to_vec(), wait_ms })
    }

    /// Says what became of an [`Ask`]; whether somebody waited for it still.
    ///
    /// # Errors
    /// As all calls.
    pub fn answer_ask(&mut self, token: &str, answer: AskAnswer) -> Answer<bool> {
        self.tree(TreeRequest::Answer { token: token.to_owned(), answer })
    }

    /// Sets which mirrored files there are.
    ///
    /// # Errors
    /// As all calls.
    pub fn set_files(&mut self, files: Vec<FilePlace>) -> Answer<()> {
        self.tree(TreeRequest::SetFiles { files })
    }

    /// What is open in the tree.
    ///
    /// # Errors
    /// As all calls.
    pub fn opens(&mut self) -> Answer<Opens> {
        self.tree(TreeRequest::Opens)
    }

    /// Lets nobody open a version of `blob`, or any of it, until [`Client::lift`]; what is open in the tree.
    ///
    /// # Errors
    /// As all calls.
    pub fn bar(&mut self, blob: &str, number: Option<u64>) -> Answer<Opens> {
        self.tree(TreeRequest::Bar { blob: blob.to_owned(), number })
    }

    /// Takes back one bar, or all.
    ///
    /// # Errors
    /// As all calls.
    pub fn lift(&mut self, bar: Option<(String, Option<u64>)>) -> Answer<()> {
        self.tree(TreeRequest::Lift { bar })
    }

    /// Withdraws a mirrored file that nobody has open, where it has no local changes or `changed` says that these are
    /// of no use; whether it was so.
    ///
    /// # Errors
    /// As all calls.
    pub fn retire(&mut self, overlay: u64, changed: bool) -> Answer<bool> {
        self.tree(TreeRequest::Retire { overlay, changed })
    }

    /// Bytes of local changes.
    ///
    /// # Errors
    /// As all calls.
    pub fn changed_bytes(&mut self, overlay: u64) -> Answer<u64> {
        self.tree(TreeRequest::Changed { overlay })
    }
}
