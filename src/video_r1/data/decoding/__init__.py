"""From a file to frames: containers, clips, pictures, worker processes, the frame cache."""
