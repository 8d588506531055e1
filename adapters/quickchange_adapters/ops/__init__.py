"""Matrix products of the multi-adapter linear: a plain reference, then paths per device."""
