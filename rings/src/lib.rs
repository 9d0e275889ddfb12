//! Guest-memory rings: the device side and the driver side of virtqueues. Depends on no other Ringside crate, on no socket and on no KVM.
