"""The ground floor: device, memory, flags, files, output. Imports nothing of this project; everything may import it."""
