"""What is optimised, on what data, judged how."""
