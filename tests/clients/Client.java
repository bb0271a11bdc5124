import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.HttpURLConnection;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

/** Asks for sessions as Java programs do. Arguments: host, port. */
class Client {
    public static void main(String[] arguments) throws Exception {
        String host = arguments[0];
        int port = Integer.parseInt(arguments[1]);
        URI sessions = URI.create("http://" + host + ":" + port + "/v1/sessions");

        // This one offers to go over to HTTP/2 (Upgrade: h2c).
        HttpClient client = HttpClient.newHttpClient();
        HttpRequest.Builder request = HttpRequest.newBuilder(sessions);
        request.header("content-type", "application/json");
        for (String body : new String[] {"", "{}"}) {
            HttpRequest post = request.POST(BodyPublishers.ofString(body)).build();
            System.out.println("HttpClient " + client.send(post, BodyHandlers.ofString()).statusCode());
        }

        HttpURLConnection old = (HttpURLConnection) sessions.toURL().openConnection();
        old.setRequestMethod("POST");
        System.out.println("HttpURLConnection " + old.getResponseCode());

        try (Socket raw = new Socket(host, port)) {
            String whole = "POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            raw.getOutputStream().write(whole.getBytes());
            raw.shutdownOutput();
            BufferedReader answer = new BufferedReader(new InputStreamReader(raw.getInputStream()));
            System.out.println("half-closed " + answer.readLine().split(" ")[1]);
        }
    }
}
