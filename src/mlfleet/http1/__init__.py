"""HTTP/1.1 for hundreds of requests and streams at once: llhttp's parser on the event loop's own transports."""
