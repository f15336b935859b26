"""Files that several processes share: locks and leases."""
