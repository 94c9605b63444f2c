"""Online backfilling: a catalogue's vectors move from one embedder to the next while queries go on."""
