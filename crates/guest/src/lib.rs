//! What a guest's memory says about itself, and what follows from it: which pages an offshoot is about to touch.
//!
//! Pure: no files, sockets, threads, clocks or random numbers. Time is passed in.

pub mod plan;
