"""OpenAI's Responses API, on the same turns as chat completions. Nothing is kept between requests."""
