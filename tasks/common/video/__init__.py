"""Video files and frames, for every task that reads or writes them: decoding, encoding, frames, shards."""
