"""Does a mount ever break a reader? ``make chaos`` kills daemons and fails the store to find out."""
