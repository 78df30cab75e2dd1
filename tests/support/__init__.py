"""Test doubles and fixtures that several tests use."""
