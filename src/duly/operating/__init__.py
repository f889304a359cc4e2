"""What people do to a running application, beside mending: steering, tracing, erasing, checking."""
