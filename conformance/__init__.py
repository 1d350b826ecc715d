"""A black-box suite for any server that speaks the OpenAI API: one case for each thing a client relies on."""
