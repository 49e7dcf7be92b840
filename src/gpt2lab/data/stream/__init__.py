"""Text that is learned from while it is read: a source larger than the disk, a bounded window of it at a time."""
