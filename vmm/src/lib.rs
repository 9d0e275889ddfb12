//! A minimal KVM virtual machine monitor. Depends on `ringside-rings` and `ringside-vfio`, never on the back-ends: it meets them over a Unix socket.
