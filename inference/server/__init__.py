"""A server with OpenAI's interface in front of the generation engine; `app.make_app` puts it together."""
