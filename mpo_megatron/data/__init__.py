"""Groups: from the formats people have, to token ids on disk, to packed rows."""
