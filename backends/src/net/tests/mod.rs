//! Queue pairs served from a driver's rings: on a socket pair in place of a TAP, and on a TAP where the
//! system lets us have one.

#![allow(
    clippy::cast_possible_truncation,
    reason = "all numbers of these tests are small"
)]

pub(super) mod driver;
mod on_socket;
mod on_tap;
mod random;
