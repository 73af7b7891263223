"""Serving: requests over HTTP to rows of one decode loop."""
