"""The alignment methods: one short file each, calling stages only."""
