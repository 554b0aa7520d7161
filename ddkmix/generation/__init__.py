"""Generation: what a model answers to prompts, the same whatever else is decoded at the same time.

`decode.Decoder` makes responses, `sampling` chooses their tokens, `slots` holds the keys and values of rows
that are decoded together, and `replay_buffer.ReplayBuffer` keeps the last responses of a student in training.
"""
