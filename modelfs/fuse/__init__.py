"""The tree as a FUSE file system: operations, the transports that drive them, and mountpoints."""
