"""The shapes on the wire: OpenAI's objects, with extra keys beside theirs, never new values inside theirs."""
