//! What several tests need: whether there is a KVM to test with. The programs' tests include this file too.

use std::io::{self, Write};

use kvm_ioctls::Kvm;

/// Whether this user can make virtual machines here. If not, `test` says so on standard error and is to end.
pub(crate) fn has_kvm(test: &str) -> bool {
    let Err(why) = Kvm::new().and_then(|kvm| kvm.create_vm()) else {
        return true;
    };
    // Past the capture of the test harness: a test that did not run must not look like one that did.
    let _ = writeln!(io::stderr(), "test {test}: skipped: /dev/kvm: {why}");
    false
}
