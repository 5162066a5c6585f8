"""Reading a model's answer: reasoning, text and tool calls, told apart while the text still arrives."""
