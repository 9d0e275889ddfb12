//! The control plane of all of Ringside's programs: one format of requests, of errors and of metrics, spoken over a Unix
//! socket. Depends on no other crate of the workspace; which commands there are is each program's own business.
//!
//! One JSON object in each line, both ways. A request has a `command`, its `arguments` if it takes any, and an `id` if the client
//! wants one in the answer. The answer has a `result` or an `error`:
//!
//! ```text
//! {"id": 1, "command": "device-add", "arguments": {"host": "0000:01:10.0", "id": "nic"}}
//! {"id": 1, "result": {"id": "nic"}}
//! {"id": 2, "command": "device-remove", "arguments": {"id": "disk"}}
//! {"id": 2, "error": {"code": "not-found", "message": "there is no device `disk`; ..."}}
//! ```
//!
//! The same socket answers `GET /metrics` of HTTP/1.x with the program's metrics in Prometheus's text format, for
//! `curl --unix-socket` and for collectors.
//!
//! | module | concern |
//! | --- | --- |
//! | [`error`] | errors as users and clients see them |
//! | [`size`], [`options`] | values as people write them: `512M`, `key=value,key=value` |
//! | [`socket`] | a listening Unix socket, and its file |
//! | [`peers`] | whose connections are taken |
//! | [`metrics`] | Prometheus's text format |
//! | `http` | as much of HTTP as a collector of metrics needs |
//! | [`server`] | the socket of a program, its clients, and who answers them |
//! | [`client`] | one request to such a socket |
//! | [`ctl`] | the program `ringside-ctl` |
#![forbid(unsafe_code)]

pub mod client;
pub mod ctl;
pub mod error;
mod http;
pub mod metrics;
pub mod options;
pub mod peers;
pub mod server;
pub mod size;
pub mod socket;

pub use error::{ApiError, Chain, ErrorCode};
pub use metrics::Metrics;
pub use peers::{PeerError, Peers};
pub use server::{BoundSocket, ControlSocket, Service};
pub use size::Size;
pub use socket::{ListenError, SocketFile, connect_at_once};
