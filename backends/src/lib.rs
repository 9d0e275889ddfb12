//! Vhost-user device back-ends and the daemon shell they share. Depends on `ringside-rings`.
