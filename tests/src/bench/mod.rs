//! Benchmarks of the back-ends, natively: no virtual machine, a front-end of our own or of others on the same machine.

pub mod load;
