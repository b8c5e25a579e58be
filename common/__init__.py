"""The ground floor, which everything may import: device, memory, flags, lines of JSON, files, output."""
