"""The data plane: how blocks get from stores into the cache, and readers served meanwhile."""
