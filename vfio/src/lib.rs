//! SR-IOV virtual functions and VFIO devices. Depends on no other Ringside crate.
