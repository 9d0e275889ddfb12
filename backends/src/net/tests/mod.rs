//! Queue pairs served from a driver's rings: on a socket pair in place of a TAP, and on a TAP and
//! other links where the system lets us have them.

#![allow(
    clippy::cast_possible_truncation,
    reason = "all numbers of these tests are small"
)]

pub(super) mod driver;
mod on_links;
mod on_socket;
mod on_tap;
mod random;
