"""What can be heard in a sound: named sounds, likeness to a reference, and the sifting of a folder of recordings (spec/cat.md 11)."""
