"""The built-in data: captioned scenes of coloured shapes, exact enough that a program can judge a picture against its
caption."""
